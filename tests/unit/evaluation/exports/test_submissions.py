"""Submissions are what the published formats say, complete, and written whole or not at all.

The checks are those of the challenges' own tools, written out here from their descriptions.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.exports import epic_kitchens as epic_challenge
from karmma_dist.evaluation.exports import something_something as ssv2_submission
from karmma_dist.evaluation.exports.epic_kitchens import SupervisionLevels, parse_levels
from karmma_dist.evaluation.exports.exports import Exports
from karmma_dist.evaluation.exports.predictions import PredictionCollector, Predictions

IDS = ["P01_11_0", "P01_11_1", "P02_03_12"]
EPIC = {"verb": 97, "noun": 300}


def log_probs(heads: dict[str, int], num: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return {h: (3 * torch.randn(num, c, generator=generator)).log_softmax(1).numpy() for h, c in heads.items()}


def predictions(heads: dict[str, int], keys: list[str], shown: int | None = None) -> Predictions:
    """Return predictions under one condition; only the first `shown` clips have its modality."""
    shown = len(keys) if shown is None else shown
    masks = (np.arange(len(keys)) < shown).astype(np.uint8)[:, None]
    collector = PredictionCollector(["video"], [Condition(("video",))])
    labels = {head: np.full(len(keys), -1) for head in heads}
    values = {head: values_NC[:, None] for head, values_NC in log_probs(heads, len(keys)).items()}
    collector.add(keys, masks > 0, labels, masks, masks, values)
    return collector.finish()


def check_epic_submission(submission: dict[str, Any], expected_ids: list[str]) -> None:
    """Check `test.json` as the challenge's validation does."""
    assert set(submission) == {"version", "challenge", "sls_pt", "sls_tl", "sls_td", "results"}
    assert submission["version"] == "0.2"
    assert submission["challenge"] == "action_recognition"
    assert all(0 <= submission[level] <= 5 for level in ("sls_pt", "sls_tl", "sls_td"))
    assert sorted(submission["results"]) == sorted(expected_ids)
    for segment in submission["results"].values():
        assert set(segment) == {"verb", "noun", "action"}
        assert sorted(map(int, segment["verb"])) == list(range(97))
        assert sorted(map(int, segment["noun"])) == list(range(300))
        assert len(segment["action"]) == 100
        for action in segment["action"]:
            verb, noun = (int(part) for part in action.split(","))
            assert 0 <= verb < 97
            assert 0 <= noun < 300
        scores = [score for by_class in segment.values() for score in by_class.values()]
        assert all(type(score) is float and np.isfinite(score) for score in scores)


def read_zip(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["test.json"]
        assert archive.testzip() is None
        content: dict[str, Any] = json.loads(archive.read("test.json"))
    return content


def test_the_epic_kitchens_zip_passes_the_challenges_validation(tmp_path: Path):
    scores = log_probs(EPIC)
    epic_challenge.write_submission(tmp_path / "s.zip", IDS, scores, SupervisionLevels(1, 2, 4))
    submission = read_zip(tmp_path / "s.zip")
    check_epic_submission(submission, IDS)
    assert [submission[level] for level in ("sls_pt", "sls_tl", "sls_td")] == [1, 2, 4]
    for row, narration_id in enumerate(IDS):
        for head, values in scores.items():
            actual = submission["results"][narration_id][head]
            assert [np.float32(actual[str(c)]) for c in range(EPIC[head])] == values[row].tolist()


def test_action_scores_are_the_hundred_most_probable_pairs(tmp_path: Path):
    scores = log_probs(EPIC)
    epic_challenge.write_submission(tmp_path / "s.zip", IDS, scores, SupervisionLevels())
    for row, narration_id in enumerate(IDS):
        actions = read_zip(tmp_path / "s.zip")["results"][narration_id]["action"]
        verb, noun = (np.exp(scores[head][row].astype(np.float64)) for head in ("verb", "noun"))
        joint = {f"{v},{n}": verb[v] * noun[n] for v in range(97) for n in range(300)}
        best = sorted(joint, key=lambda pair: -joint[pair])[:100]
        assert list(actions) == best
        assert list(actions.values()) == pytest.approx([joint[pair] for pair in best])


def test_a_softmax_of_submitted_scores_gives_the_models_probabilities(tmp_path: Path):
    scores = log_probs(EPIC)
    epic_challenge.write_submission(tmp_path / "s.zip", IDS, scores, SupervisionLevels())
    actual = read_zip(tmp_path / "s.zip")["results"][IDS[0]]["noun"]
    exponents = np.exp(np.array([actual[str(c)] for c in range(300)]))
    assert exponents / exponents.sum() == pytest.approx(np.exp(scores["noun"][0]), rel=1e-5)


def test_the_official_evaluators_pickle_has_its_three_arrays(tmp_path: Path):
    scores = log_probs(EPIC)
    epic_challenge.write_submission(tmp_path / "p.pkl", IDS, scores, SupervisionLevels())
    content = (tmp_path / "p.pkl").read_bytes()
    read = pickle.loads(content)
    assert set(read) == {"verb_output", "noun_output", "narration_id"}
    assert (read["verb_output"].shape, read["noun_output"].shape) == ((3, 97), (3, 300))
    assert read["verb_output"].dtype == read["noun_output"].dtype == np.float32
    assert (read["noun_output"] == scores["noun"]).all()
    assert read["narration_id"].tolist() == IDS
    assert b"_core" not in content


def test_the_something_something_csv_lists_each_clips_five_best_classes(tmp_path: Path):
    scores = log_probs({"action": 174})
    ids = ["1420", "97", "220847"]
    ssv2_submission.write_submission(tmp_path / "s.csv", ids, scores)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert [line.split(";")[0] for line in lines] == ids
    for line, values_C in zip(lines, scores["action"], strict=True):
        classes = [int(part) for part in line.split(";")[1:]]
        assert classes == sorted(range(174), key=lambda c: -values_C[c])[:5]


@pytest.mark.parametrize(
    ("name", "heads", "file"),
    [
        ("epic-kitchens", EPIC, "s.zip"),
        ("epic-kitchens", EPIC, "s.pkl"),
        ("something-something", {"action": 9}, "s.csv"),
    ],
)
def test_a_submission_that_lacks_a_clip_is_not_written(tmp_path: Path, name: str, heads: dict[str, int], file: str):
    path = tmp_path / file
    exports = Exports(submission=(name, path))
    with pytest.raises(UserError, match=r"1 of 3 have no prediction .* the first: P02_03_12"):
        exports.write(predictions(heads, IDS, shown=2), IDS)
    with pytest.raises(UserError, match=r"1 of 4 have no prediction .* the first: P09_01_7"):
        exports.write(predictions(heads, IDS), [*IDS, "P09_01_7"])
    assert list(tmp_path.iterdir()) == []
    (line,) = exports.write(predictions(heads, IDS), IDS)
    assert str(path) in line
    assert path.is_file()


def test_a_failed_write_keeps_the_earlier_submission(tmp_path: Path):
    path = tmp_path / "s.zip"
    epic_challenge.write_submission(path, IDS, log_probs(EPIC), SupervisionLevels())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        epic_challenge.write_submission(path, IDS[:2], log_probs(EPIC, seed=1), SupervisionLevels())
    assert path.read_bytes() == before


def test_invalid_submissions_are_refused_before_anything_runs(tmp_path: Path):
    one, several = [Condition(("video",))], [Condition(("video",)), Condition(("audio",))]
    zipped, levels = ("epic-kitchens", tmp_path / "s.zip"), SupervisionLevels()
    for exports, heads, conditions, message in (
        (Exports(submission=zipped), {"verb": 4, "noun": 10}, one, "challenge has verb 97, noun 300"),
        (Exports(submission=zipped), {"action": 174}, one, "this model's heads are action 174"),
        (Exports(submission=zipped), EPIC, several, "one condition, not of 2"),
        (Exports(submission=("epic-kitchens", tmp_path / "s.csv")), EPIC, one, "name a .zip"),
        (Exports(submission=("epic-kitchens", tmp_path / "no" / "s.zip")), EPIC, one, "no folder"),
        (Exports(submission=("something-something", tmp_path / "s.csv")), EPIC, one, "one head"),
        (Exports(submission=("something-something", tmp_path / "s.zip")), {"action": 9}, one, "ends in .csv"),
        (Exports(levels=levels), EPIC, one, "--sls has no effect"),
        (Exports(submission=("epic-kitchens", tmp_path / "s.pkl"), levels=levels), EPIC, one, "--sls has no effect"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            exports.check(heads, conditions)
        assert "\n" not in str(caught.value)
    Exports(submission=("epic-kitchens", tmp_path / "s.pkl")).check({"verb": 4, "noun": 10}, one)


def test_supervision_levels_are_three_digits_from_0_to_5():
    assert parse_levels("0,5,3") == SupervisionLevels(0, 5, 3)
    for text in ("", "1,2", "1,2,3,4", "6,1,1", "-1,1,1", "a,b,c", "1,,2"):
        with pytest.raises(UserError, match="from 0 to 5"):
            parse_levels(text)
