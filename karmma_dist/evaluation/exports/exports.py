"""The files that an evaluation exports: predictions and submissions, checked before anything is computed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.exports import epic_kitchens as epic_challenge
from karmma_dist.evaluation.exports import predictions
from karmma_dist.evaluation.exports import something_something as ssv2_submission
from karmma_dist.evaluation.exports.epic_kitchens import SupervisionLevels
from karmma_dist.evaluation.exports.predictions import Predictions
from karmma_dist.shards.format import Clip

EPIC_KITCHENS = "epic-kitchens"
SOMETHING_SOMETHING = "something-something"
FORMATS = (EPIC_KITCHENS, SOMETHING_SOMETHING)
"""Official formats of a submission."""


@dataclass(frozen=True)
class Exports:
    """The requested files."""

    predictions: Path | None = None
    """`.npz` or `.parquet` file for all predictions."""
    submission: tuple[str, Path] | None = None
    """Format, one of `FORMATS`, and file."""
    levels: SupervisionLevels | None = None
    """Supervision levels of an Epic-Kitchens submission; None: the levels of the recipes."""

    @property
    def are_wanted(self) -> bool:
        """True if any file is requested."""
        return self.predictions is not None or self.submission is not None

    def check(self, heads: dict[str, int], conditions: Sequence[Condition]) -> None:
        """Check that all requested files can be written.

        Raises:
            UserError: a file has the wrong suffix, a folder is missing or cannot be written, the format does not fit
                the model's heads, a submission is requested for several conditions, or supervision levels are given
                without a zip to write them to.
        """
        if self.predictions is not None:
            predictions.check_path(self.predictions)
            check_file(self.predictions, "--predictions")
        if self.levels is not None and (
            self.submission is None or self.submission[0] != EPIC_KITCHENS or self.submission[1].suffix != ".zip"
        ):
            raise UserError("--sls has no effect without --submission epic-kitchens FILE.zip: leave it out")
        if self.submission is None:
            return
        name, path = self.submission
        if not path.absolute().parent.is_dir():
            raise UserError(f"--submission {name} {path}: no folder {path.parent}: create it first")
        checks = {EPIC_KITCHENS: epic_challenge.check_heads, SOMETHING_SOMETHING: ssv2_submission.check_heads}
        checks[name](heads, path)
        check_file(path, f"--submission {name}")
        if len(conditions) != 1:
            raise UserError(
                f"--submission {name}: the file holds the predictions of one condition, not of {len(conditions)}: "
                "leave out --subsets, --sweep and --missing, and give one seed"
            )

    def check_clips(self, clips: Sequence[Clip], modalities: Sequence[str]) -> None:
        """Check that the model can be shown every clip, if a submission is requested.

        Args:
            clips: Every clip of the split.
            modalities: Modalities that the only condition names.

        Raises:
            UserError: a clip has none of the modalities.
        """
        if self.submission is None:
            return
        lacking = sorted(clip.key for clip in clips if not any(clip.has(modality) for modality in modalities))
        if lacking:
            name, path = self.submission
            raise UserError(
                f"--submission {name} {path}: every clip is needed, but {len(lacking)} of {len(clips)} have none of "
                f"{', '.join(modalities)}, the first: {lacking[0]}: evaluate with more modalities"
            )

    def write(self, made: Predictions, split_keys: Sequence[str]) -> list[str]:
        """Write the files and return a line about each.

        Args:
            made: All predictions.
            split_keys: Keys of all clips of the split; a submission must contain all of them.

        Raises:
            UserError: a clip of the split has no prediction, so the submission is not written.
        """
        lines = []
        if self.predictions is not None:
            predictions.write_predictions(made, self.predictions)
            lines.append(f"predictions of {len(made.keys)} clips: {self.predictions}")
        if self.submission is not None:
            lines.append(self._submit(*self.submission, made, split_keys))
        return lines

    def _submit(self, name: str, path: Path, made: Predictions, split_keys: Sequence[str]) -> str:
        keys, log_probs = made.of_condition(0)
        missing = sorted(set(split_keys) - set(keys))
        if missing:
            raise UserError(
                f"--submission {name} {path}: not written, since every clip is needed: {len(missing)} of "
                f"{len(split_keys)} have no prediction (damaged, or without the modalities), the first: {missing[0]}"
            )
        if name == SOMETHING_SOMETHING:
            ssv2_submission.write_submission(path, keys, log_probs)
            return f"submission of {len(keys)} clips: {path}"
        levels = self.levels or SupervisionLevels()
        epic_challenge.write_submission(path, keys, log_probs, levels)
        if path.suffix != ".zip":
            return f"predictions of {len(keys)} segments for the official evaluate.py: {path}"
        listed = f"{levels.pretraining},{levels.training_labels},{levels.training_data}"
        return f"submission of {len(keys)} segments at supervision levels {listed} (--sls changes them): {path}"


def check_file(path: Path, option: str) -> None:
    """Check, before hours of work, that a file can be written; the file is not created.

    Raises:
        UserError: the path is a folder, or its folder cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.absolute().parent):  # a trial, since permissions alone do not tell
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}): name another file") from None
