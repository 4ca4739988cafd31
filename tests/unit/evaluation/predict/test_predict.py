"""Predictions from files and from shards equal those of an evaluation; bad input is reported in one line."""

from __future__ import annotations

import json
import logging
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.plan import plan_evaluation
from karmma_dist.evaluation.predict import media as predict_media
from karmma_dist.evaluation.predict.predict import predict
from karmma_dist.evaluation.predict.prediction import Prediction, likeliest
from karmma_dist.evaluation.run import carry_out
from karmma_dist.models.karmma import KarmmaModel
from kits.evaluation import NOUNS, SPANS, VERBS, make_place
from kits.packing import write_movie


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("predict"))


def ask(place: Path, *clips: str, run: str = "student", **options: object) -> list[Prediction]:
    return predict(place / run, clips, shards=str(place / "shards"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", ["student", "teacher", "listener"])
@pytest.mark.parametrize(("key", "span"), [(f"one_{n}", span) for n, span in enumerate(SPANS)])
def test_a_file_is_predicted_like_its_packed_clip(place: Path, run: str, key: str, span: tuple):
    start_s, stop_s = (float(text) if text else None for text in span)
    (of_file,) = ask(place, str(place / "raw/one.mp4"), run=run, start_s=start_s, stop_s=stop_s)
    (of_key,) = ask(place, key, run=run)
    assert of_file.guesses == of_key.guesses
    assert (of_file.found, of_file.seconds) == (of_key.found, of_key.seconds)
    assert (of_file.labels, of_key.labels) == ({}, {"verb": "open", "noun": "tap"})


def test_other_spans_and_other_packing_settings_give_other_predictions(place: Path):
    first, second = (ask(place, str(place / "raw/one.mp4"), start_s=start)[0].guesses for start in (0.2, 1.0))
    assert first != second
    settings = json.loads((place / "shards/manifest.json").read_text())["settings"]
    path = place / "raw/one.mp4"
    sizes = []
    for short_side in (40, 24):
        changed = {**settings, "video": {**settings["video"], "short_side": short_side}}
        with predict_media.packed_media(path, changed, ["video"]) as folder:
            sizes.append(folder.metadata(folder.clips("clip")[0]).pictures.height)
    assert sizes == [40, 24]


@pytest.mark.parametrize("run", ["student", "teacher"])
def test_a_key_is_predicted_as_the_evaluation_predicts_it(place: Path, run: str):
    """The only clip of the validation split is "open tap"; the evaluation's rows contain its loss and ranks."""
    plan = plan_evaluation(
        place / run, lambda available: build_conditions(available, subsets=True), shards=str(place / "shards"),
        num_workers=0,
    )  # fmt: skip
    done = carry_out(plan)
    (prediction,) = ask(place, "one_0", run=run)
    rows = {row.modalities: row.figures for row in done.results.rows}
    assert [guess.modalities for guess in prediction.guesses] == [
        ["video"], ["flow"], ["audio"], ["video", "flow", "audio"],
    ]  # fmt: skip
    for guess in prediction.guesses:
        row = rows[tuple(guess.modalities)]
        names = [action.names for action in guess.actions]
        true = {"verb": "open", "noun": "tap"}
        assert (row["action_top1"] == 100) == (names[0] == true)
        assert (row["action_top5"] == 100) == (true in names)
        if true in names:
            probability = guess.actions[names.index(true)].probability
            assert -math.log(probability) == pytest.approx(row["verb_loss"] + row["noun_loss"], rel=1e-5)


def test_absent_modalities_are_named_and_switched_off_ones_unused(place: Path):
    silent_file, silent_key = ask(place, str(place / "raw/silent.mp4"), "silent_0")
    for prediction in (silent_file, silent_key):
        assert (prediction.found, prediction.absent, prediction.switched_off) == (["video", "flow"], ["audio"], [])
    (sound,) = ask(place, str(place / "raw/sound.m4a"))
    assert (sound.found, sound.absent) == (["audio"], ["video", "flow"])
    assert [guess.modalities for guess in sound.guesses] == [["audio"]]
    (complete,) = ask(place, "one_0")
    (narrowed,) = ask(place, "one_0", modalities="V,A")
    assert (narrowed.found, narrowed.absent, narrowed.switched_off) == (["video", "audio"], [], ["flow"])
    assert narrowed.guesses[0] == complete.guesses[0]
    assert narrowed.guesses[-1] != complete.guesses[-1]


logits = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


@given(logits, logits)
def test_actions_are_pairs_sorted_by_joint_probability(verb: list[float], noun: list[float]):
    scores = {"verb": torch.tensor(verb, dtype=torch.float64), "noun": torch.tensor(noun, dtype=torch.float64)}
    log_probs = {head: scores_C.log_softmax(0) for head, scores_C in scores.items()}
    actual = likeliest(log_probs, {}, num=100)
    expected = {
        (v, n): math.exp(float(log_probs["verb"][v] + log_probs["noun"][n]))
        for v, n in product(range(len(verb)), range(len(noun)))
    }
    assert {(a.classes["verb"], a.classes["noun"]): a.probability for a in actual} == pytest.approx(expected)
    assert [action.probability for action in actual] == sorted((a.probability for a in actual), reverse=True)
    assert sum(action.probability for action in actual) == pytest.approx(1)
    assert all(action.names == {head: str(number) for head, number in action.classes.items()} for action in actual)


def test_a_model_without_verbs_and_nouns_predicts_its_actions():
    actual = likeliest({"action": torch.tensor([0.1, 0.7, 0.2]).log()}, {"action": ["a", "b", "c"]}, num=2)
    assert [(action.names, round(action.probability, 3)) for action in actual] == [
        ({"action": "b"}, 0.7), ({"action": "c"}, 0.2),
    ]  # fmt: skip


def test_diverged_weights_are_reported():
    with pytest.raises(UserError, match="nan"):
        likeliest({"action": torch.tensor([0.1, float("nan")])}, {})


def test_a_long_video_causes_a_warning_before_packing(place: Path, caplog, monkeypatch):
    monkeypatch.setattr(predict_media, "LONG_S", 1.5)
    with caplog.at_level(logging.WARNING):
        ask(place, str(place / "raw/one.mp4"))
    assert "2 s long" in caplog.text
    assert "--start" in caplog.text
    caplog.clear()
    ask(place, str(place / "raw/one.mp4"), start_s=0.2, stop_s=1.2)
    assert not caplog.text


def test_nothing_is_left_behind_whatever_happens(place: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ask(place, str(place / "raw/one.mp4"))
    with pytest.raises(UserError, match=r"after the end of one\.mp4"):
        ask(place, str(place / "raw/one.mp4"), start_s=100.0)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_names_and_json(place: Path, capsys):
    arguments = [str(place / "student"), "one_0", "silent_0", "--shards", str(place / "shards")]
    assert main(["predict", *arguments]) == 0
    out = capsys.readouterr().out
    assert "one_0 (1.04 s): found video (V), flow (F), audio (A)" in out
    assert "labelled: open tap" in out
    assert "silent_0 (0.8 s): found video (V), flow (F); no audio" in out
    assert "V+F+A says" in out
    assert main(["predict", *arguments, "--json"]) == 0
    expected = [prediction.to_dict() for prediction in ask(place, "one_0", "silent_0")]
    assert json.loads(capsys.readouterr().out) == {"clips": expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student", "one_9"], "no clip 'one_9', and no file of this name (did you mean 'one_"),
        (["student", "gone.mp4"], "gone.mp4: no such file"),
        (["student", "RAW"], "is a folder"),
        (["student", "RAW/train.csv"], "not a video file"),
        (["student", "RAW/one.mp4", "--start", "100"], "start 100 s is after the end of one.mp4"),
        (["student", "RAW/one.mp4", "--start", "1", "--stop", "0.5"], "stop 0.5 s is not after start 1 s"),
        (["student", "one_0", "--start", "1"], "--start and --stop apply to files"),
        (["student", "one_0", "--modalities", "D"], "modality 'detections' is not one of this model's"),
        (["student", "one_0", "--modalities", "X"], "unknown modality 'X'"),
        (["listener", "RAW/silent.mp4"], "it has video, but the model is to be given audio"),
        (["listener", "silent_0"], "the clip has video and flow, but the model needs one of audio"),
        (["student", "RAW/sound.m4a", "--modalities", "V,F"], "it has audio, but the model is to be given video, flow"),
        (["nothing", "one_0"], "no such run folder"),
        (["student", ""], "of the command line is empty"),
        (["student", "RAW/one.mp4", "--start", "nan"], "one.mp4: start nan is not a number of seconds"),
        (["student", "RAW/one.mp4", "--stop", "inf"], "one.mp4: stop inf is not a number of seconds"),
        (["student", "RAW/../shards/train-000000.tar"], "is a tar archive"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place: Path, capsys, arguments: list[str], message: str):
    run, *rest = [text.replace("RAW", str(place / "raw")) for text in arguments]
    assert main(["predict", str(place / run), *rest, "--shards", str(place / "shards")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("missing", ["two", "RAW/two.mp4"])
def test_every_clip_is_looked_for_before_the_first_is_predicted(place: Path, monkeypatch, missing: str):
    def encode(*_: object) -> None:
        raise AssertionError("a clip was predicted")

    monkeypatch.setattr(KarmmaModel, "encode", encode)
    with pytest.raises(UserError, match="two"):
        ask(place, "one_0", missing.replace("RAW", str(place / "raw")))


@pytest.mark.parametrize("clip", ["one_0", "raw/one.mp4"])
def test_clips_of_another_datasets_shards_are_refused(place: Path, tmp_path: Path, clip: str):
    """Labels would get the wrong names, and files would be cut with the wrong settings."""
    manifest = json.loads((place / "shards/manifest.json").read_text())
    for path in (place / "shards").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"heads": {"verb": VERBS[::-1], "noun": NOUNS}}))
    named = str(place / clip) if "/" in clip else clip
    message = rf"class 0 of 'verb' is '{VERBS[-1]}' in the shards, '{VERBS[0]}' in the model: name shards of the.*set$"
    with pytest.raises(UserError, match=message):
        predict(place / "student", [named], shards=str(tmp_path))


def test_a_table_of_four_guesses_fits_a_terminal(place: Path, capsys):
    assert main(["predict", str(place / "student"), "one_0", "one_1", "--shards", str(place / "shards")]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("V+F+A says" in line for line in lines) == 2
    assert any(f"{verb} {noun}" in shown.out for verb, noun in product(VERBS, NOUNS))
    assert "predict: 2/2" in shown.err


def test_eval_breaks_the_sensors_of_packed_clips(place: Path, tmp_path: Path, capsys):
    """Check through the loader and its worker that the audio arrives uncut, and that the figures change."""
    broken = ("--corrupt", "audio:desync:3", "--corrupt", "camera:black:5")
    arguments = ["eval", str(place / "student"), "--shards", str(place / "shards"), "--split", "train"]
    assert main([*arguments, *broken, "--out", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["corrupt"] for row in rows] == [None, "audio:desync:3", "camera:black:5"]
    assert len({row["verb_loss"] for row in rows}) == 3
    assert len({json.dumps(row["num_kept"]) for row in rows}) == 1
    assert "| camera:black:5 | 100% of the clip" in (tmp_path / "report.md").read_text()
    assert main([*arguments, "--corrupt", "audio:blur:3"]) == 2
    assert "audio:mute, audio:noise, audio:desync" in capsys.readouterr().err


def test_eval_breaks_every_view_but_exports_intact_predictions(place: Path, tmp_path: Path, capsys):
    arguments = ["eval", str(place / "student"), "--shards", str(place / "shards"), "--split", "train"]
    broken = ("--corrupt", "audio:noise:5", "--corrupt", "camera:frozen:5")
    rows, files = [], []
    for number, choices in enumerate([(), broken]):
        path = tmp_path / f"{number}.npz"
        out = ("--out", str(tmp_path / str(number)), "--predictions", str(path), "--json")
        assert main([*arguments, "--views", "2x3", *choices, *out]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"])
        with np.load(path) as file:
            files.append(dict(file))
    intact, broken = rows
    assert [row["corrupt"] for row in broken] == [None, "audio:noise:5", "camera:frozen:5"]
    assert broken[0] == intact[0]
    assert len({row["verb_loss"] for row in broken}) == 3
    assert files[0].keys() == files[1].keys()
    assert all(np.array_equal(values, files[1][name]) for name, values in files[0].items())


def test_without_shards_nobody_knows_how_to_cut_a_file(place: Path):
    for clip in (str(place / "raw/one.mp4"), "one_0"):
        with pytest.raises(UserError, match="--shards"):
            predict(place / "student", [clip])


def test_a_damaged_clip_is_an_error_not_an_absence(place: Path, tmp_path: Path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (place / "shards").iterdir():
        if path.is_file():
            (shards / path.name).write_bytes(path.read_bytes())
    tar = shards / "validation-000000.tar"
    data = bytearray(tar.read_bytes())
    index = json.loads((shards / "validation-000000.index.json").read_text())
    offset, size, _ = index["clips"][0]["members"]["audio"]
    data[offset + size // 2] ^= 255
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"one_0\.audio\.flac: crc32 differs"):
        predict(place / "student", ["one_0"], shards=str(shards))


def test_a_damaged_file_is_an_error(place: Path, tmp_path: Path):
    write_movie(tmp_path / "whole.mp4", frames=60, bursts=[0.4], index_first=True)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 3])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        ask(place, str(tmp_path / "cut.mp4"))
