"""A file vouches for every byte of it, and says what it takes; whatever else it is, is one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.cli import main
from karmma_dist.deploy import model_file
from karmma_dist.deploy.model_file import BLANK, DIGEST, HEADER, ModelHeader, ModelInput, read_model_file, seal
from karmma_dist.errors import UserError

VIDEO = ModelInput("video", "V", (4, 32, 32, 3), "uint8", "frames, rows, columns, RGB", None)
AUDIO = ModelInput("audio", "A", (1, 16000), "int16", "windows, samples", 16000.0)
WRITTEN = ModelHeader(
    run="a run", precision="fp32", modalities=(VIDEO, AUDIO), heads={"verb": 2}, classes={"verb": ["open", "clöse"]},
    inputs={"video": {"num_frames": 4}}, packing={"video": {"max_fps": 12.5}}, recipe_sha256=None,
    weights_sha256="a" * 64, versions={"torch": "2.15.0"},
)  # fmt: skip


def write(path: Path, header: str, digest: bool = True) -> Path:
    """Write a small ONNX model with this header."""
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [300]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", values[:1], values[1:]))
    onnx.helper.set_model_props(model, {"other": "x" * 300, HEADER: header, **({DIGEST: BLANK} if digest else {})})
    content = model.SerializeToString()
    path.write_bytes(seal(content) if digest else content)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("files") / "model.onnx", WRITTEN.to_json())


def test_a_header_is_read_as_it_was_written(file: Path) -> None:
    content, header = read_model_file(file)
    assert header == WRITTEN
    assert content == file.read_bytes()
    assert [each.name for each in onnx.load(file).graph.input] == ["x"]
    for changed in (replace(WRITTEN, packing=None), replace(WRITTEN, recipe_sha256="b" * 64, classes={})):
        assert ModelHeader.parse(changed.to_json()) == changed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_found_wherever_it_is(file: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"^.*damaged\.onnx: .*damaged") as caught:
        read_model_file(damaged)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 10**6))
def test_a_cut_file_is_found_wherever_it_ends(file: Path, length: int) -> None:
    content = file.read_bytes()
    cut = file.with_name("cut.onnx")
    cut.write_bytes(content[: length % len(content)])
    with pytest.raises(UserError, match=r"damaged"):
        read_model_file(cut)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (WRITTEN.to_json().replace('"format": 1', '"format": 2'), "it has format 2, and this version reads format 1"),
        (WRITTEN.to_json().replace('"uint8"', "8"), r"modalities\[0\].dtype is 8"),
        ("{", "Expecting property name"),
    ],
)
def test_a_header_that_is_another_is_one_line(tmp_path: Path, capsys, header: str, message: str) -> None:
    path = write(tmp_path / "model.onnx", header)
    with pytest.raises(UserError, match=message):
        read_model_file(path)
    assert main(["predict", str(path), "clip.mp4"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_other_files_are_refused(tmp_path: Path, capsys) -> None:
    text = tmp_path / "notes.onnx"
    text.write_text("no model, but notes of somebody\n" * 20)
    plain = write(tmp_path / "plain.onnx", "{}", digest=False)
    for path, message in (
        (text, "no ONNX model, or one that is damaged"),
        (plain, "holds no header of karmma-dist export"),
        (tmp_path / "absent.onnx", "no such file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            read_model_file(path)
    assert main(["predict", str(text), "clip.mp4"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {text}: no ONNX model")


def test_a_larger_file_than_a_model_can_be_is_refused(file: Path, monkeypatch) -> None:
    monkeypatch.setattr(model_file, "MOST_BYTES", 100)
    with pytest.raises(OSError, match="more than 100 bytes"):
        read_model_file(file)
