"""An exported file answers like its run for every subset, computes only what is present, and stores nothing twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from karmma_dist.cli import main
from karmma_dist.deploy import export
from karmma_dist.deploy.runtime import Runtime
from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES, Decoder, subsets
from kits.exported import export_again, exported, loaded, save_sensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sensors(tmp_path_factory.mktemp("exported") / "sensors", average="probabilities", missing="leave_out")


def clip(runtime: Runtime, seed: int) -> dict[str, np.ndarray]:
    """Return arrays of a clip: pixels of any value; boxes and signals of small numbers."""
    random = np.random.default_rng(seed)
    return {
        each.modality: random.integers(0, 256 if each.dtype == "uint8" else 3, each.shape).astype(each.dtype)
        for each in runtime.header.modalities
    }


@torch.no_grad()
def test_every_subset_is_answered_like_the_run(run: Path) -> None:
    model, runtime = loaded(run), Runtime.open(exported(run).path)
    for seed, chosen in enumerate(subsets(model.modalities)):
        arrays = {name: array for name, array in clip(runtime, seed).items() if name in chosen}
        inputs = {
            name: MODALITIES[name].tensors.make(torch.from_numpy(array)[None], model.inputs.section(name), None)
            for name, array in arrays.items()
        }
        expected = model(inputs, torch.tensor([[name in chosen for name in model.modalities]]))
        answers = runtime.logits(arrays)
        for head, logits in expected.items():
            np.testing.assert_allclose(answers[head], logits[0].numpy(), rtol=1e-4, atol=1e-4)


def test_weights_of_an_encoder_are_used_only_where_it_is_present(run: Path) -> None:
    graph = onnx.load(exported(run).path).graph
    branches = {node.input[0]: node for node in graph.node if node.op_type == "If"}
    assert set(branches) == {"has_video", "has_detections", "has_signal"}
    for flag, node in branches.items():
        name = flag.removeprefix("has_")
        then, absent = (next(a.g for a in node.attribute if a.name == f"{which}_branch") for which in ("then", "else"))
        assert [each.op_type for each in absent.node] == ["Constant", "ConstantOfShape"]
        assert any(name in each.input for each in then.node)
    outside = {value for node in graph.node if node.op_type != "If" for value in node.input}
    assert not outside & {"video", "detections", "signal"}


def test_the_file_holds_the_parameters_and_every_table_once(run: Path) -> None:
    constants: dict[tuple, str] = {}
    float_bytes = 0
    for graph in graphs_of(onnx.load(exported(run).path).graph):
        held = [a.t for node in graph.node for a in node.attribute if node.op_type == "Constant" and a.name == "value"]
        for tensor in [*graph.initializer, *held]:
            array = onnx.numpy_helper.to_array(tensor)
            if array.size >= 1024:
                content = (array.dtype, array.shape, array.tobytes())
                assert content not in constants, f"{tensor.name} is {constants[content]} again"
                assert array.dtype != np.int64
                constants[content] = tensor.name
            float_bytes += array.nbytes * (array.dtype == np.float32)
    assert float_bytes < 1.02 * exported(run).parameter_bytes


def test_a_value_that_an_encoder_has_no_row_for_is_one_line(run: Path) -> None:
    runtime = Runtime.open(exported(run).path)
    arrays = {"detections": np.full_like(clip(runtime, 0)["detections"], 7)}
    with pytest.raises(UserError, match=r"^the arrays of the clip: onnxruntime .* cannot run the model") as caught:
        runtime.logits(arrays)
    assert "\n" not in str(caught.value)


def graphs_of(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph, *(each for one in inner for each in graphs_of(one))]


def test_half_precision_halves_the_file_and_hardly_changes_answers(run: Path) -> None:
    whole, half = exported(run), exported(run, "fp16")
    assert whole.num_bytes - half.num_bytes > 0.4 * whole.parameter_bytes
    arrays = clip(Runtime.open(whole.path), 0)
    exact, rounded = (Runtime.open(each.path).logits(arrays)["action"] for each in (whole, half))
    assert 0 < np.abs(exact - rounded).max() < 0.03


def test_the_file_says_nothing_of_the_machine_that_wrote_it(run: Path) -> None:
    content = exported(run).path.read_bytes()
    for path in (str(run), str(Path(export.__file__).parents[2]), str(Path(torch.__file__).parents[1])):
        assert path.encode() not in content


def test_a_file_whose_answers_differ_is_not_written(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_TOLERANCE", {"fp32": 0.0})
    with pytest.raises(UserError, match=r"sensors: not exported: the file's logits differ from the run's by"):
        export_again(run, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def refusal(*words: str) -> str:
        assert main(["export", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert refusal(str(run), "--out", str(tmp_path / "model.pt")).endswith("must end with .onnx")
    assert refusal(str(run), "--out", str(tmp_path / "a/model.onnx")).endswith("its folder does not exist")
    (tmp_path / "folder.onnx").mkdir()
    assert refusal(str(run), "--out", str(tmp_path / "folder.onnx")).endswith("is a folder: name a file")
    assert str(tmp_path / "nothing") in refusal(str(tmp_path / "nothing"), "--out", str(tmp_path / "model.onnx"))
    assert str(tmp_path / "none") in refusal(str(run), "--shards", str(tmp_path / "none"))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "onnxscript", None)
        assert refusal(str(run)).endswith("onnxscript is not installed: pip install 'karmma-dist[export]'")
    with monkeypatch.context() as patch:
        patch.setattr(type(MODALITIES["signal"].decoder), "array", Decoder.array)
        assert "modality signal cannot be exported: SignalDecoder has no method 'array'" in refusal(str(run))


class Undecided(torch.nn.Module):
    """A module that reads a value in Python to decide what to compute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


def test_a_part_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(UserError, match=r"^the encoder of smell cannot be exported: PyTorch") as caught:
        export._trace(Undecided(), (torch.ones(3),), "the encoder of smell")
    assert "\n" not in str(caught.value)
