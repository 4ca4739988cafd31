"""The batch: identical in structure on every rank and step, with tensors of the present clips only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from karmma_dist.memory.memory import Source
from karmma_dist.memory.records import Lookups
from karmma_dist.modalities import MODALITIES
from karmma_dist.recipe import InputRecipe
from karmma_dist.streaming.reader import Sample, UncutSignal
from karmma_dist.streaming.worker_status import LoadStats

UNLABELLED = -1
"""Label of a clip in an unlabelled split."""


@dataclass
class Damage:
    """A declared member that could not be read or decoded."""

    shard: str
    key: str
    member: str
    what: str

    def __str__(self) -> str:
        """Return one line that names shard, clip, member and problem."""
        return f"{self.shard}: clip {self.key}: {self.member}: {self.what}"


@dataclass(frozen=True)
class RememberedTokens:
    """The tokens of a modality that a batch's clips bring instead of arrays."""

    is_remembered_N: Tensor
    """bool, True = the clip's tokens are remembered; of the clips that have the modality, in batch order."""
    packed_NX: Tensor
    """Packed tokens of the remembered clips, uint8; see `TokenMemory`."""


@dataclass
class Batch:
    """A batch of B clips. The loader gives inputs as decoded arrays; `prepare` turns them into the models' tensors."""

    keys: list[str]
    """Clip keys, "" for padding."""
    present_BM: Tensor
    """bool, True = present; columns in the order of the recipe's modalities."""
    inputs: dict[str, Tensor]
    """Present clips only, in batch order, by modality; a modality that no clip has is missing."""
    labels: dict[str, Tensor]
    """int64 (B,) by head, -1 if unlabelled, or if the clip's dataset does not have the head."""
    valid_B: Tensor
    """bool, False = padding in evaluation."""
    jitter: dict[str, Tensor]
    """Colour jitter of the present clips, float32 (N, 3), by jittered modality; missing if no clip is jittered."""
    epoch: int = 0
    step: int = 0
    heads_vary: bool = False
    """True if clips may lack heads, since they are of datasets with different heads. Equal in all batches of a run."""
    damage: list[Damage] = field(default_factory=list)
    """Damaged members found while this batch was made."""
    stats: LoadStats = field(default_factory=LoadStats)
    """Time and bytes that the batch cost its worker."""
    uncut: dict[str, list[UncutSignal]] = field(default_factory=dict)
    """Whole signals of the present clips, in batch order, by modality, for the modalities that were requested."""
    sources: list[Source] = field(default_factory=list)
    """Each clip's place in memories; empty without one."""
    answers_BEA: Tensor | None = None
    """The teacher's remembered answers, if all of the batch's are: `inputs` may then lack modalities that only the
    teacher needs."""
    tokens: dict[str, RememberedTokens] = field(default_factory=dict)
    """Remembered tokens by modality: `inputs` lacks these clips. Missing if no clip's are remembered."""
    lookups: Lookups = field(default_factory=Lookups)
    """What the teacher's memory was asked for."""
    token_lookups: Lookups = field(default_factory=Lookups)
    """What the memories of frozen encoders were asked for."""
    dropped: Batch | None = None
    """The same clips with the modalities that dropout takes from them, for a teacher that is asked about all subsets;
    padding for a clip of which one is damaged. None if it is padding alone, or nobody asks."""

    @property
    def labelled(self) -> dict[str, Tensor] | None:
        """bool (B,) by head, True = the clip has the head; None unless `heads_vary`."""
        return {head: labels_B >= 0 for head, labels_B in self.labels.items()} if self.heads_vary else None

    def tensors(self) -> list[Tensor]:
        """Return every tensor that `map` changes."""
        remembered = [] if self.answers_BEA is None else [self.answers_BEA]
        remembered += [tokens.packed_NX for tokens in self.tokens.values()]
        dropped = [] if self.dropped is None else self.dropped.tensors()
        return [*self.jitter.values(), *self.inputs.values(), *self.labels.values(), *remembered, *dropped]

    def only(self, modalities: Sequence[str], columns: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs and present_BM of some modalities, for a model that takes only these.

        Args:
            modalities: Modalities of the model, in its order.
            columns: Modalities of the columns of `present_BM`.
        """
        if list(modalities) == list(columns):
            return self.inputs, self.present_BM
        inputs = {m: x for m, x in self.inputs.items() if m in modalities}
        return inputs, self.present_BM[:, [list(columns).index(m) for m in modalities]]

    def with_dropped(self, columns: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs and present_BM of the clips with `dropped`, as far as that was read.

        Args:
            columns: Modalities of the columns of `present_BM`.
        """
        if self.dropped is None:
            return self.inputs, self.present_BM
        inputs = {**self.inputs, **self.dropped.inputs}
        for m, name in enumerate(columns):
            if name in self.inputs and name in self.dropped.inputs:
                rows_N = torch.cat([batch.present_BM[:, m].nonzero() for batch in (self, self.dropped)])
                both_N = torch.cat([self.inputs[name], self.dropped.inputs[name]])
                inputs[name] = both_N.index_select(0, rows_N.flatten().argsort().to(both_N.device))
        return inputs, self.present_BM | self.dropped.present_BM

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `change` applied to every tensor except `present_BM` and `valid_B`.

        These two decide which computation runs: they stay on the CPU, so that reading them never waits for a device.
        """
        return replace(
            self,
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            labels={head: change(label) for head, label in self.labels.items()},
            jitter={name: change(factors) for name, factors in self.jitter.items()},
            answers_BEA=None if self.answers_BEA is None else change(self.answers_BEA),
            tokens={name: replace(tokens, packed_NX=change(tokens.packed_NX)) for name, tokens in self.tokens.items()},
            dropped=None if self.dropped is None else self.dropped.map(change),
        )


def collate(
    samples: Sequence[Sample | None], modalities: Sequence[str], heads: Sequence[str], epoch: int = 0, step: int = 0
) -> Batch:
    """Put samples together into a batch; None is padding (no modality, no label, not valid)."""
    present = [[sample is not None and m in _kept(sample) for m in modalities] for sample in samples]
    inputs = {}
    for modality in modalities:
        arrays = [sample.arrays[modality] for sample in samples if sample is not None and modality in sample.arrays]
        if arrays:
            inputs[modality] = torch.from_numpy(np.stack(arrays))
    dropped = [None if sample is None else sample.dropped for sample in samples]
    answers = [sample.answer_EA for sample in samples if sample is not None and sample.answer_EA is not None]
    labels = {
        head: torch.tensor([_label(sample, head) for sample in samples], dtype=torch.int64) for head in heads
    }
    return Batch(
        keys=["" if sample is None else sample.key for sample in samples],
        present_BM=torch.tensor(present, dtype=torch.bool).reshape(len(samples), len(modalities)),
        inputs=inputs,
        labels=labels,
        valid_B=torch.tensor([sample is not None for sample in samples]),
        jitter=_jitter([sample for sample in samples if sample is not None], modalities),
        epoch=epoch,
        step=step,
        sources=[sample.source for sample in samples if sample is not None and sample.source is not None],
        answers_BEA=torch.stack(answers) if len(answers) == len(samples) > 0 else None,
        tokens=_remembered_tokens([sample for sample in samples if sample is not None], modalities),
        uncut={
            name: signals
            for name in modalities
            if (signals := [sample.uncut[name] for sample in samples if sample is not None and name in sample.uncut])
        },
        dropped=collate(dropped, modalities, (), epoch, step) if any(dropped) else None,
    )


def _remembered_tokens(samples: Sequence[Sample], modalities: Sequence[str]) -> dict[str, RememberedTokens]:
    remembered = {}
    for name in modalities:
        packed = [sample.tokens[name] for sample in samples if name in sample.tokens]
        if packed:
            is_remembered = [name in sample.tokens for sample in samples if name in _kept(sample)]
            remembered[name] = RememberedTokens(torch.tensor(is_remembered), torch.stack(packed))
    return remembered


def _kept(sample: Sample) -> Collection[str]:
    return sample.arrays if sample.kept is None else sample.kept


def _jitter(samples: Sequence[Sample], modalities: Sequence[str]) -> dict[str, Tensor]:
    jitter = {}
    for name in modalities:
        factors_N3 = [sample.jitter_3 for sample in samples if name in sample.arrays]
        if MODALITIES[name].is_jittered and any((factors_3 != 1).any() for factors_3 in factors_N3):
            jitter[name] = torch.from_numpy(np.stack(factors_N3))
    return jitter


def _label(sample: Sample | None, head: str) -> int:
    label = None if sample is None else sample.labels.get(head)
    return UNLABELLED if label is None else label


def prepare(
    batch: Batch, inputs: InputRecipe, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Batch:
    """Move a batch to `device` and turn its arrays into the tensors that models take, with each modality's maker.

    Tensors are computed in float32 and then cast to `dtype`, the model's precision.
    """
    moved = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
    tensors = {
        name: MODALITIES[name].tensors.make(arrays_N, inputs.section(name), moved.jitter.get(name)).to(dtype)
        for name, arrays_N in moved.inputs.items()
    }
    dropped = None if moved.dropped is None else prepare(moved.dropped, inputs, device, dtype)
    return replace(moved, inputs=tensors, dropped=dropped)
