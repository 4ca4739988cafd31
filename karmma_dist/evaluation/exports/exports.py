"""What an evaluation writes for others to read: predictions and submissions, checked before anything is computed."""

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
    """Files asked for."""

    predictions: Path | None = None
    """`.npz` or `.parquet` of all predictions."""
    submission: tuple[str, Path] | None = None
    """One of `FORMATS`, and the file."""
    levels: SupervisionLevels | None = None
    """What an Epic-Kitchens submission says of the training; None: the levels of the recipes."""

    @property
    def are_wanted(self) -> bool:
        """Whether there is any."""
        return self.predictions is not None or self.submission is not None

    def check(self, heads: dict[str, int], conditions: Sequence[Condition]) -> None:
        """Refuse what cannot be written.

        Raises:
            UserError: a wrong suffix, no folder, one that cannot be written, heads that a format does not take, a
                submission of several conditions, or supervision levels without a zip to put them into.
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
            raise UserError(f"--submission {name} {path}: no folder {path.parent}: make it first")
        checks = {EPIC_KITCHENS: epic_challenge.check_heads, SOMETHING_SOMETHING: ssv2_submission.check_heads}
        checks[name](heads, path)
        check_file(path, f"--submission {name}")
        if len(conditions) != 1:
            raise UserError(
                f"--submission {name}: it holds the predictions of one condition, not of {len(conditions)}: leave out "
                "--subsets and --sweep, and give one seed"
            )

    def check_clips(self, clips: Sequence[Clip], modalities: Sequence[str]) -> None:
        """Refuse a submission of a split with clips that the model cannot be shown.

        Args:
            clips: Every clip of the split.
            modalities: What its one condition names.

        Raises:
            UserError: a clip has none of them.
        """
        if self.submission is None:
            return
        lacking = sorted(clip.key for clip in clips if not any(clip.has(modality) for modality in modalities))
        if lacking:
            name, path = self.submission
            raise UserError(
                f"--submission {name} {path}: it needs every clip, and {len(lacking)} of {len(clips)} have none of "
                f"{', '.join(modalities)}, the first: {lacking[0]}: evaluate with further modalities"
            )

    def write(self, made: Predictions, split_keys: Sequence[str]) -> list[str]:
        """Write the files and return a line about each.

        Args:
            made: All predictions.
            split_keys: Every clip of the split; a submission must have them all.

        Raises:
            UserError: a clip of the split has no prediction, so no submission is written.
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
                f"--submission {name} {path}: not written, since it needs every clip: {len(missing)} of "
                f"{len(split_keys)} have no prediction (damaged, or without the modalities), the first: {missing[0]}"
            )
        if name == SOMETHING_SOMETHING:
            ssv2_submission.write_submission(path, keys, log_probs)
            return f"submission of {len(keys)} clips: {path}"
        levels = self.levels or SupervisionLevels()
        epic_challenge.write_submission(path, keys, log_probs, levels)
        if path.suffix != ".zip":
            return f"predictions of {len(keys)} segments for the official evaluate.py: {path}"
        said = f"{levels.pretraining},{levels.training_labels},{levels.training_data}"
        return f"submission of {len(keys)} segments at supervision levels {said} (--sls changes them): {path}"


def check_file(path: Path, option: str) -> None:
    """Check, before hours of work, that a file can be put beside others of its folder; none is made.

    Raises:
        UserError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.absolute().parent):  # tried, since permissions alone do not tell
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}): name another file") from None
