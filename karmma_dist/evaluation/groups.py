"""The groups of clips that Epic-Kitchens reports beside all clips: rare classes, and people never trained on.

As in the official evaluation (epic-kitchens/C1-Action-Recognition): a clip counts to the tail of a head when its true
class is in the published list; to the tail of the action when its verb **or** its noun is; and as unseen when its
participant has no clip in the training split. Accuracy over a group is top-1 over its clips. Three things differ there
and change no figure: actions are ranked among the products of the 100 best verbs and 100 best nouns, the softmax runs
over all clips at once (a factor that a clip's pairs share), and only the one list of participants it is given counts.

Legend: N clips.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, DamageError

TAIL_FILES = {"verb": "EPIC_100_tail_verbs.csv", "noun": "EPIC_100_tail_nouns.csv"}
"""Published list of rare classes per head; its one column is named like the head."""

UNSEEN_FILES = "EPIC_100_unseen_participant_ids*.csv"
"""Published lists of participants without training clips, one per split. Nobody is unseen in one split and trained on
in another, so all of them are read, whatever the shards call their splits."""


@dataclass(frozen=True)
class Groups:
    """Which classes are rare and which participants were never trained on."""

    tail: Mapping[str, frozenset[int]]
    """Rare classes per head; empty: there are no such lists."""
    unseen: frozenset[str]
    """Participants; empty: there is no such list."""
    participant_of: Callable[[str], str | None]
    """Participant of a clip, by key; None where the dataset names none."""

    def members(
        self, keys: Sequence[str], labels: Mapping[str, np.ndarray], sources: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Which clips are in each group ("tail", "unseen") that there is a list for, per figure: bool (N,).

        Args:
            keys: N clip keys.
            labels: int64 (N,) per head.
            sources: Per figure ("action", "verb", ...) the heads it is made of.
        """
        found: dict[str, dict[str, np.ndarray]] = {}
        if self.tail:
            rare = {head: np.isin(labels[head], sorted(classes)) for head, classes in self.tail.items()}
            found["tail"] = {
                name: np.any([rare[head] for head in heads], axis=0)
                for name, heads in sources.items()
                if all(head in rare for head in heads)
            }
        if self.unseen:
            unseen_N = np.array([self.participant_of(key) in self.unseen for key in keys], dtype=bool)
            found["unseen"] = dict.fromkeys(sources, unseen_N)
        return found


def read_groups(annotations: Path, heads: Mapping[str, int], participant_of: Callable[[str], str | None]) -> Groups:
    """Read the lists of an annotations folder.

    Args:
        annotations: Folder of the official CSVs.
        heads: Number of classes per head of the model.
        participant_of: Participant of a clip, by key.

    Raises:
        UserError: no such folder, none of the lists, one tail list without the other, or a row that is no class.
    """
    if not annotations.is_dir():
        raise UserError(f"{annotations}: no such annotations folder (evaluation.annotations or --annotations)")
    files = {head: annotations / name for head, name in TAIL_FILES.items()}
    there = {head: path for head, path in files.items() if path.is_file()}
    unseen = sorted(annotations.glob(UNSEEN_FILES))
    if not there and not unseen:
        raise UserError(f"{annotations}: none of {', '.join(TAIL_FILES.values())}, {UNSEEN_FILES} is there")
    if there and len(there) < len(files):
        missing = next(path for path in files.values() if not path.is_file())
        raise UserError(f"{missing}: no such file, but the other tail list is there: the action's tail needs both")
    for head in there:
        if head not in heads:
            raise UserError(f"{there[head]}: the model has no head '{head}' (it has {', '.join(heads)})")
    tail = {head: _classes(path, head, heads[head]) for head, path in there.items()}
    people = frozenset(person for path in unseen for _, person in _column(path, "participant_id"))
    return Groups(tail, people, participant_of)


def participants(folder: ShardFolder, clips: Sequence[Clip]) -> Callable[[str], str | None]:
    """Return the participant of a clip by its key, as its metadata in the shards says."""
    by_key = {clip.key: clip for clip in clips}

    def participant_of(key: str) -> str | None:
        try:
            participant = folder.metadata(by_key[key]).participant
        except DamageError as error:
            raise UserError(f"{error}: the shard changed during the evaluation: run it again") from None
        return None if participant is None else str(participant)

    return participant_of


def _classes(path: Path, head: str, num_classes: int) -> frozenset[int]:
    classes = set()
    for where, text in _column(path, head):
        if not text.isdigit() or int(text) >= num_classes:
            raise UserError(f"{where}: {head} '{text}' is none of the model's {num_classes} classes")
        classes.add(int(text))
    return frozenset(classes)


def _column(path: Path, column: str) -> list[tuple[str, str]]:
    """(`FILE, row N`, text) of one column of a CSV."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if column not in (reader.fieldnames or ()):
                raise UserError(f"{path}: column '{column}' is missing")
            return [(f"{path}, row {reader.line_num}", (row[column] or "").strip()) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
