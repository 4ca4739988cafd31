"""The groups of clips that Epic-Kitchens reports in addition to all clips: tail classes and unseen participants.

The groups are those of the official evaluation (epic-kitchens/C1-Action-Recognition). A clip is in the tail of a head
if its true class is in the published list, in the tail of the action if its verb **or** its noun is, and unseen if its
participant has no clip in the training split. The accuracy of a group is top-1 over its clips. The official code
differs in three ways that change no figure: it ranks actions among the products of the 100 best verbs and the 100 best
nouns, it runs the softmax over all clips at once (a factor that all pairs of a clip share), and it reads only the one
list of participants that it is given.

Legend: N clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.packing.readers.tables import integer, rows
from karmma_dist.shards.folder import Shards
from karmma_dist.shards.format import Clip, DamageError

TAIL_FILES = {"verb": "EPIC_100_tail_verbs.csv", "noun": "EPIC_100_tail_nouns.csv"}
"""Published list of rare classes of each head. Its only column has the name of the head."""

UNSEEN_FILES = "EPIC_100_unseen_participant_ids*.csv"
"""Published lists of participants without training clips, one per split. No participant is unseen in one split and
trained on in another, so all lists are read, whatever names the shards give their splits."""


@dataclass(frozen=True)
class Groups:
    """The rare classes, and the participants that have no training clip."""

    tail: Mapping[str, frozenset[int]]
    """Rare classes per head; empty without such lists."""
    unseen: frozenset[str]
    """Participants without training clips; empty without such a list."""
    participant_of: Callable[[str], str | None]
    """Function that returns the participant of a clip key, or None if the dataset does not name one."""

    def members(
        self, keys: Sequence[str], labels: Mapping[str, np.ndarray], sources: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return the members of each group ("tail", "unseen") that has a list, per scored name: bool (N,).

        Args:
            keys: N clip keys.
            labels: int64 (N,) per head.
            sources: Heads that make up the action and each head, by name ("action", "verb", ...).
        """
        groups: dict[str, dict[str, np.ndarray]] = {}
        if self.tail:
            rare = {head: np.isin(labels[head], sorted(classes)) for head, classes in self.tail.items()}
            groups["tail"] = {
                name: np.any([rare[head] for head in heads], axis=0)
                for name, heads in sources.items()
                if all(head in rare for head in heads)
            }
        if self.unseen:
            unseen_N = np.array([self.participant_of(key) in self.unseen for key in keys], dtype=bool)
            groups["unseen"] = dict.fromkeys(sources, unseen_N)
        return groups


def read_groups(annotations: Path, heads: Mapping[str, int], participant_of: Callable[[str], str | None]) -> Groups:
    """Read the lists of an annotations folder.

    Args:
        annotations: Folder of the official CSVs.
        heads: Number of classes per head of the model.
        participant_of: Function that returns the participant of a clip key.

    Raises:
        UserError: the folder is missing or holds none of the lists, one tail list is missing, the model lacks the head
            of a list, or a row does not name a class.
    """
    if not annotations.is_dir():
        raise UserError(f"{annotations}: no such annotations folder (evaluation.annotations or --annotations)")
    files = {head: annotations / name for head, name in TAIL_FILES.items()}
    existing = {head: path for head, path in files.items() if path.is_file()}
    unseen = sorted(annotations.glob(UNSEEN_FILES))
    if not existing and not unseen:
        raise UserError(f"{annotations}: contains none of {', '.join(TAIL_FILES.values())}, {UNSEEN_FILES}")
    if existing and len(existing) < len(files):
        missing = next(path for path in files.values() if not path.is_file())
        raise UserError(f"{missing}: no such file, but the other tail list exists: the action's tail needs both")
    for head in existing:
        if head not in heads:
            raise UserError(f"{existing[head]}: the model has no head '{head}' (it has {', '.join(heads)})")
    tail = {head: _classes(path, head, heads[head]) for head, path in existing.items()}
    people = frozenset(person for path in unseen for _, person in _column(path, "participant_id"))
    return Groups(tail, people, participant_of)


def participants(folder: Shards, clips: Sequence[Clip]) -> Callable[[str], str | None]:
    """Return a function from a clip key to its participant, which it reads from the metadata in the shards."""
    by_key = {clip.key: clip for clip in clips}

    def participant_of(key: str) -> str | None:
        try:
            participant = folder.metadata(by_key[key]).participant
        except DamageError as error:
            raise UserError(f"{error}: the shard changed during the evaluation: run the evaluation again") from None
        return None if participant is None else str(participant)

    return participant_of


def _classes(path: Path, head: str, num_classes: int) -> frozenset[int]:
    classes = set()
    for row, text in _column(path, head):
        label = integer(row, head, text)
        if not 0 <= label < num_classes:
            raise UserError(f"{row}: {head} '{text}' is not one of the model's {num_classes} classes")
        classes.add(label)
    return frozenset(classes)


def _column(path: Path, column: str) -> list[tuple[str, str]]:
    """Return the cells of one column of a CSV as (`FILE, row N`, text)."""
    return [(place, row[column].strip()) for place, row in rows(path, (column,), may_be_empty=True)]
