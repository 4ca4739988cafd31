"""The objective `hard_combinations`: cross-entropy that counts more for combinations of modalities that are hard.

It follows the modality-aware regularization of MMANet (arXiv 2304.08028), a rival of KARMMA. There, hard combinations
are mined while the network warms up, by how far the classes that it predicts from each combination are distributed from
those that it predicts from all modalities; then their clips have a second loss, computed by heads of a regularization
network that is discarded afterwards.

Here, combinations are compared by their running cross-entropy in training [ours: with balanced classes the
distributions hardly differ, and comparing them takes another pass over data], throughout the training instead of once,
and the second loss is that of the model's own heads: a clip of a hard combination weighs 1 + `weight`. MMANet's other
part, a margin-aware distillation from a teacher with all modalities, is not included: a study compares the parts.

Legend: B clips, S = 2^M sets of modalities, by the sum of 2^m over the modalities m of the set.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.models.losses import clip_cross_entropy
from karmma_dist.models.running_sums import RunningSums
from karmma_dist.recipe import Recipe
from karmma_dist.settings import Settings
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.objectives import Objective, ObjectiveType, SoftTargets
from karmma_dist.training.tracking import accuracies, entropies, labelled_shares

_DECAY = 0.99
"""Factor per optimizer step of the running cross-entropy."""


class HardCombinationsOptions(Settings):
    """Options of `hard_combinations`."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Additional weight of clips of a hard combination (lambda of the authors' code: 1)."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs without additional weights (5 in the authors' code)."""


class HardCombinations(Objective):
    """Cross-entropy with an additional weight for clips of hard combinations of modalities.

    As in the authors' code, the hardest combination of more than one and fewer than all modalities is mined, and hard
    are this combination and all that are part of it. (Of two modalities the harder one is hard.)

    Args:
        options: Weight and warm-up.
        recipe: The run's recipe, for its modalities.

    Raises:
        UserError: the model has a single modality.
    """

    sums: RunningSums
    """The losses of the clips of each set, and their number."""

    def __init__(self, options: HardCombinationsOptions, recipe: Recipe) -> None:
        num = len(recipe.modalities)
        if num == 1:
            raise UserError(
                "objective.name: 'hard_combinations' compares combinations of modalities, but the model has only "
                f"{recipe.modalities[0]}"
            )
        self.options = options
        self._columns = [recipe.data.modalities.index(modality) for modality in recipe.modalities]
        sets_S = torch.arange(2**num)
        sizes_S = (sets_S[:, None] >> torch.arange(num) & 1).sum(dim=1)
        self._is_candidate_S = (sizes_S >= min(2, num - 1)) & (sizes_S < num)
        self._is_part_SS = (sets_S[:, None] & sets_S == sets_S) & (sets_S > 0)  # row: the whole, column: the part
        self.sums = RunningSums(2 * len(sets_S), _DECAY)

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, the cross-entropy without weights, and the share of clips that weigh more."""
        labelled = batch.labelled
        losses_B = clip_cross_entropy(logits, batch.labels, labelled)
        present_BM = batch.present_BM[:, self._columns]
        sets_B = (present_BM.long() << torch.arange(len(self._columns))).sum(dim=1).to(losses_B.device)
        is_hard_B = self._hard(losses_B.device)[sets_B] & (batch.epoch >= self.options.warmup_epochs)
        self._note(losses_B.detach(), sets_B)
        plain = losses_B.mean()
        loss = plain + self.options.weight * (losses_B * is_hard_B).mean()
        return loss, {
            "loss": loss.detach(), "cross_entropy": plain.detach(), "hard_share": is_hard_B.float().mean(),
            **labelled_shares(labelled), **accuracies("train", logits, batch.labels, labelled),
            **entropies("train", logits, labelled),
        }  # fmt: skip

    def _hard(self, device: torch.device) -> Tensor:
        """Return bool (S,), True = hard; nothing is hard before a candidate has been seen."""
        totals_S, counts_S = self.sums.to(device).sums.unflatten(0, (2, -1))
        is_known_S = self._is_candidate_S.to(device) & (counts_S > 0)
        means_S = torch.where(is_known_S, totals_S / counts_S, -torch.inf)
        return self._is_part_SS.to(device)[means_S.argmax()] & is_known_S.any()

    def _note(self, losses_B: Tensor, sets_B: Tensor) -> None:
        """Add the clips to the sums of this step: the losses and the number of clips of each set."""
        noted = self.sums.sums.new_zeros(2, len(self._is_candidate_S))
        noted[0].index_add_(0, sets_B, losses_B.to(noted))
        noted[1].index_add_(0, sets_B, torch.ones_like(losses_B).to(noted))
        self.sums.add(noted.flatten())


def _build(options: HardCombinationsOptions, recipe: Recipe, _soft_targets: SoftTargets | None) -> Objective:
    return HardCombinations(options, recipe)


HARD_COMBINATIONS = ObjectiveType(HardCombinationsOptions, _build)
"""The entry of the table of objectives."""
