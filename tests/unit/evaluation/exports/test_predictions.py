"""Predictions are written once per clip and mask, and reproduce the rows."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions, keep
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports.predictions import PredictionCollector, Predictions, check_path, write_predictions
from karmma_dist.streaming.batch import Batch
from kits.fusion import ALL_CONDITIONS, CONDITIONS, HEADS, MODALITIES, Fusion, make_batches, predict, singles

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def written(predictions: Predictions, path: Path) -> dict[str, np.ndarray]:
    write_predictions(predictions, path)
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_the_file_gives_back_every_rows_top1(tmp_path: Path):
    predictions, results = predict()
    file = written(predictions, tmp_path / "predictions.npz")
    for k, row in enumerate(results.rows):
        at_N = file["prediction"][:, k]
        shown_N = at_N >= 0
        assert shown_N.sum() == row.num_clips
        for head in HEADS:
            best_N = file[f"log_probs_{head}"][at_N[shown_N]].argmax(axis=1)
            right = int((best_N == file[f"label_{head}"][shown_N]).sum())
            assert row.figures[f"{head}_top1"] == 100.0 * right / row.num_clips
        assert [m for m, named in zip(MODALITIES, file["condition_modalities"][k], strict=True) if named] == list(
            row.modalities
        )
        assert (file["condition_drop_prob"][k], file["condition_seed"][k]) == (row.drop_prob, row.seed)
        assert file["condition_missing"][k] == (row.missing or "")


def soft_batches(num: int) -> list[Batch]:
    """Clips on which an exact model is uncertain, with scores that never tie."""
    batches, generator = make_batches(num), torch.Generator().manual_seed(0)
    for batch in batches:
        batch.inputs = {m: x * 0.02 + 0.02 * torch.rand(x.shape, generator=generator) for m, x in batch.inputs.items()}
    return batches


def test_every_figure_of_every_row_follows_from_the_file(tmp_path: Path):
    collector = PredictionCollector(MODALITIES, CONDITIONS)
    results = evaluate(Fusion(), soft_batches(60), CONDITIONS, device="cpu", predictions=collector)
    file = written(collector.finish(), tmp_path / "predictions.npz")
    num_nouns = HEADS["noun"]
    for k, row in enumerate(results.rows):
        shown_N = file["prediction"][:, k] >= 0
        at_S = file["prediction"][shown_N, k]
        verb_SC, noun_SC = (file[f"log_probs_{head}"][at_S].astype(np.float64) for head in ("verb", "noun"))
        verb_S, noun_S = (file[f"label_{head}"][shown_N] for head in ("verb", "noun"))
        action_SC = (verb_SC[:, :, None] + noun_SC[:, None, :]).reshape(len(at_S), -1)
        for name, scores_SC, label_S in (
            ("verb", verb_SC, verb_S),
            ("noun", noun_SC, noun_S),
            ("action", action_SC, verb_S * num_nouns + noun_S),
        ):
            order_SC = np.argsort(-scores_SC, axis=1)
            right_S = order_SC[:, 0] == label_S
            sure_S = np.exp(scores_SC.max(axis=1))
            inside = [(sure_S > b / 15) & (sure_S <= (b + 1) / 15) for b in range(15)]
            gaps = [abs((right_S[in_bin] - sure_S[in_bin]).sum()) for in_bin in inside]
            per_class = [right_S[label_S == label].mean() for label in set(label_S.tolist())]
            expected = {
                "top1": 100 * right_S.mean(),
                "top5": 100 * (order_SC[:, :5] == label_S[:, None]).any(axis=1).mean(),
                "mean_class": 100 * np.mean(per_class),
                "ece": 100 * sum(gaps) / len(at_S),
            }
            assert {metric: row.figures[f"{name}_{metric}"] for metric in expected} == pytest.approx(expected, abs=1e-4)
            ranks_N = results.per_clip.ranks[name][:, k]
            assert (ranks_N[~shown_N] == -1).all()
            assert ((ranks_N[shown_N] == 0) == right_S).all()
    assert any(row.num_without for row in results.rows)
    for head in HEADS:
        most = max(np.bincount(file[f"label_{head}"]))
        assert results.summary.majority_top1[head] == 100.0 * most / len(file["keys"])


def test_log_probabilities_match_the_models_scores():
    everything = build_conditions(MODALITIES)
    collector, batches, model = PredictionCollector(MODALITIES, everything), soft_batches(20), Fusion().eval()
    evaluate(model, batches, everything, device="cpu", predictions=collector)
    keys, log_probs = collector.finish().of_condition(0)
    assert len(keys) == 20
    for clip in singles(batches):
        with torch.no_grad():
            logits = model.fuse(model.encode(clip.inputs, clip.present_BM), clip.present_BM, clip.present_BM)
        for head, scores in logits.items():
            found_C = log_probs[head][keys.index(clip.keys[0])]
            assert found_C == pytest.approx(scores[0].log_softmax(0).numpy(), abs=1e-5)


def test_each_condition_has_the_predictions_it_has_alone():
    predictions, _ = predict()
    for k, condition in enumerate(ALL_CONDITIONS):
        collector = PredictionCollector(MODALITIES, [condition])
        evaluate(Fusion(), make_batches(), [condition], device="cpu", predictions=collector)
        (keys, actual), (expected_keys, expected) = predictions.of_condition(k), collector.finish().of_condition(0)
        assert keys == expected_keys
        assert all((actual[head] == expected[head]).all() for head in HEADS)


def test_each_prediction_has_the_mask_of_its_seed_and_key(tmp_path: Path):
    file = written(predict()[0], tmp_path / "predictions.npz")
    bits_M = 1 << np.arange(len(MODALITIES))
    for k, condition in enumerate(ALL_CONDITIONS):
        kept_NM = keep(condition, file["keys"].tolist(), torch.from_numpy(file["present"]), MODALITIES).numpy()
        mask_N = kept_NM @ bits_M
        at_N = file["prediction"][:, k]
        assert ((at_N >= 0) == (mask_N > 0)).all()
        shown_N = at_N >= 0
        assert (file["mask"][at_N[shown_N]] == mask_N[shown_N]).all()
        assert (file["clip"][at_N[shown_N]] == np.flatnonzero(shown_N)).all()


def test_only_different_masks_are_stored():
    predictions, _ = predict(num=60)
    pairs = list(zip(predictions.clip_R.tolist(), predictions.mask_R.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == len(np.unique(predictions.prediction_NK[predictions.prediction_NK >= 0]))
    subsets_of_each = 2 ** predictions.present_NM.sum(axis=1) - 1
    assert len(pairs) == subsets_of_each.sum() < 60 * len(CONDITIONS) / 4
    assert all(values.dtype == np.float32 for values in predictions.log_probs.values())


@settings(max_examples=15, deadline=None)
@given(num=st.integers(1, 40), batch_size=st.integers(1, 41))
def test_predictions_do_not_depend_on_the_batch_size(num: int, batch_size: int):
    expected, (actual, _) = predict(num, num)[0], predict(num, batch_size)
    assert actual.keys == expected.keys == sorted(expected.keys)
    for name in ("present_NM", "prediction_NK", "clip_R", "mask_R"):
        assert (getattr(actual, name) == getattr(expected, name)).all()
    for head in HEADS:
        assert (actual.labels[head] == expected.labels[head]).all()
        assert (actual.log_probs[head] == expected.log_probs[head]).all()


def test_collecting_predictions_changes_no_row():
    assert predict()[1] == evaluate(Fusion(), make_batches(), ALL_CONDITIONS, device="cpu")


def test_clips_without_labels_are_predicted_and_not_scored():
    batches = make_batches(num=20)
    for batch in batches:
        batch.labels["noun"][:] = -1
    collector = PredictionCollector(MODALITIES, CONDITIONS)
    results = evaluate(Fusion(), batches, CONDITIONS, device="cpu", predictions=collector)
    assert results.rows == []
    assert (results.summary.num_clips, results.summary.num_unlabelled) == (0, 20)
    assert len(collector.finish().keys) == 20


def test_a_condition_without_clips_has_no_prediction():
    batches = make_batches(num=6)
    for batch in batches:
        batch.present_BM[:, 2] = False
        batch.inputs.pop("audio", None)
        batch.present_BM[:, 0] = batch.valid_B
        batch.inputs["video"] = torch.ones(int(batch.valid_B.sum()), 6)
    only_sound = [c for c in CONDITIONS if c.modalities == ("audio",)]
    collector = PredictionCollector(MODALITIES, only_sound)
    evaluate(Fusion(), batches, only_sound, device="cpu", predictions=collector)
    made = collector.finish()
    assert (made.prediction_NK == -1).all()
    assert len(made.keys) == 6
    assert made.of_condition(0)[0] == []


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(file, **_arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    predictions, _ = predict(num=3)
    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_predictions(predictions, tmp_path / "predictions.npz")
    assert not (tmp_path / "predictions.npz").exists()


def test_an_unwritable_path_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for path, message in (
        (tmp_path / "p.csv", "ends in .npz or .parquet"),
        (tmp_path / "p.parquet", r"pip install 'karmma-dist\[parquet\]'"),
        (tmp_path / "none" / "p.npz", "no folder"),
    ):
        with pytest.raises(UserError, match=message):
            check_path(path)


def read_parquet(path: Path) -> dict[str, list]:
    columns: dict[str, list] = importlib.import_module("pyarrow.parquet").read_table(path).to_pydict()
    return columns


@needs_pyarrow
def test_parquet_holds_the_same_predictions(tmp_path: Path):
    predictions, _ = predict(num=9)
    write_predictions(predictions, tmp_path / "p.parquet")
    table = read_parquet(tmp_path / "p.parquet")
    assert table["key"] == [predictions.keys[row] for row in predictions.clip_R]
    for column, flags_RM in (
        ("present", predictions.present_NM[predictions.clip_R]),
        ("modalities", predictions.mask_R[:, None] & 2 ** np.arange(len(MODALITIES)) > 0),
    ):
        assert [[m in names for m in MODALITIES] for names in table[column]] == flags_RM.tolist()
    for head in HEADS:
        assert table[f"label_{head}"] == predictions.labels[head][predictions.clip_R].tolist()
        assert (np.array(table[f"log_probs_{head}"], dtype=np.float32) == predictions.log_probs[head]).all()


@needs_pyarrow
def test_parquet_alone_gives_back_every_rows_top1(tmp_path: Path):
    predictions, results = predict()
    write_predictions(predictions, tmp_path / "p.parquet")
    table = read_parquet(tmp_path / "p.parquet")
    for row in results.rows:
        condition = {"modalities": list(row.modalities), "drop_prob": row.drop_prob, "seed": row.seed,
                     "missing": row.missing}  # fmt: skip
        places = [place for place, listed in enumerate(table["conditions"]) if condition in listed]
        assert len(places) == len({table["key"][place] for place in places}) == row.num_clips
        for head in HEADS:
            right = sum(
                np.argmax(table[f"log_probs_{head}"][place]) == table[f"label_{head}"][place] for place in places
            )
            assert row.figures[f"{head}_top1"] == 100.0 * right / row.num_clips


@pytest.mark.parametrize("name", ["p.npz", pytest.param("p.parquet", marks=needs_pyarrow)])
def test_a_kill_while_writing_keeps_the_earlier_file(tmp_path: Path, name: str):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from kits.fusion import predict\n"
        "from karmma_dist.evaluation.exports.predictions import write_predictions\n"
        "path = Path(sys.argv[1])\n"
        "write_predictions(predict(num=3)[0], path)\n"
        "print(path.stat().st_size, flush=True)\n"
        "later, _ = predict(num=40)\n"
        "os.fsync = lambda _file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_predictions(later, path)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    path = tmp_path / name
    assert path.stat().st_size == int(ran.stdout)
    if name.endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            assert len(file["keys"]) == 3
    else:
        assert len(set(read_parquet(path)["key"])) == 3
