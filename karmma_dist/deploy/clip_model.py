"""A model as functions of one clip that can be traced: none of them reads in Python which modalities are present.

`KarmmaModel` takes a batch of present clips and decides by `present_BM` what to compute, which tracing cannot follow.
Here presence is a tensor: a modality's tokens are computed by `ClipEncoder`, or are zeros, and `ClipFusion` gives the
logits that `KarmmaModel.forward` gives for the clip. Preprocessing of the decoded arrays is included.

Legend: one clip, M modalities, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders.transformer import at_least_float32
from karmma_dist.models.karmma import KarmmaModel, tau_average

_FUSIONS = ("transformer", "mean")
_MISSING = ("leave_out", "stand_in", "zeros")


def check_exportable(model: KarmmaModel) -> None:
    """Check that the functions below compute what the model computes.

    Raises:
        UserError: the model fuses modalities, or treats missing ones, in a way that is not implemented here.
    """
    for field, value, known in (
        ("fusion", model.recipe.fusion, _FUSIONS), ("missing", model.recipe.missing, _MISSING),
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"model.{field} is {value}: only {', '.join(known)} can be exported")


class ClipEncoder(nn.Module):
    """The way of one modality from a decoded array to its tokens: tensor, encoder, tau-average, Linear.

    Args:
        model: The model, in eval mode.
        modality: One of its modalities.
    """

    def __init__(self, model: KarmmaModel, modality: str) -> None:
        super().__init__()
        self.encoder, self.projection = model.encoders[modality], model.projections[modality]
        self._tensors, self._settings = MODALITIES[modality].tensors, model.inputs.section(modality)
        self._recipe = model.recipe

    def forward(self, array: Tensor) -> Tensor:
        """Return the tokens (1, T, D) of the array that the modality's decoder gives for one view of a clip."""
        tokens: Tensor = self.encoder(self._tensors.make(array[None], self._settings, None))
        if self._recipe.fusion == "mean":
            reduced = tokens.mean(dim=1, keepdim=True)
        else:
            reduced = tau_average(tokens, self._recipe.tau, self._recipe.grouping)
        return cast(Tensor, self.projection(reduced))


class ClipFusion(nn.Module):
    """The way from the tokens of all modalities to the logits.

    Args:
        model: The model, in eval mode.
    """

    def __init__(self, model: KarmmaModel) -> None:
        super().__init__()
        self.stand_ins, self.fusion, self.shared = model.stand_ins, model.fusion, model.shared
        self.classifiers = nn.ModuleList(model.classifiers[head] for head in model.heads)
        self._modalities, self._lengths = model.modalities, [model.num_tokens[name] for name in model.modalities]
        self._leaves_out, self._average = model.leaves_out, model.recipe.average

    def forward(self, tokens: Sequence[Tensor], present: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits (C,) of each head, in the order of the model's heads.

        Args:
            tokens: Tokens (1, T, D) of each modality, in the order of the model's; zeros for an absent one.
            present: bool (), True = the clip has the modality. At least one is.
        """
        if self.fusion is None:
            outputs = tokens[0]
            return self._predict(outputs, torch.ones_like(outputs[..., 0]))
        parts = [
            self.stand_ins[name](part) if name in self.stand_ins else part
            for name, part in zip(self._modalities, tokens, strict=True)
        ]
        counted_1M, attend_1T = torch.ones(1, len(parts), dtype=torch.bool), None
        if self._leaves_out:
            counted_1M = torch.stack(list(present))[None]
            attend_1T = torch.cat(
                [flag.expand(1, length) for flag, length in zip(present, self._lengths, strict=True)], dim=1
            )
        cls_11D, *rest = self.fusion(torch.cat(parts, dim=1), attend_1T).split([1, *self._lengths], dim=1)
        outputs = torch.cat([cls_11D, *(part.mean(dim=1, keepdim=True) for part in rest)], dim=1)  # (1, M + 1, D)
        counted = F.pad(counted_1M.to(outputs), (1, 0), value=1.0)
        return self._predict(outputs, counted / counted.sum(dim=1, keepdim=True))

    def _predict(self, outputs_1MD: Tensor, weights_1M: Tensor) -> list[Tensor]:
        """Average the predictions of the output tokens, as logits or as probabilities."""
        hidden = outputs_1MD if self.shared is None else F.gelu(self.shared(outputs_1MD))
        weights_1M1 = weights_1M[:, :, None]
        logits = [classifier(hidden) for classifier in self.classifiers]  # (1, M + 1, C)
        if self._average == "logits":
            return [(each * weights_1M1).sum(dim=1)[0] for each in logits]
        log_weights = at_least_float32(weights_1M1).log()
        return [torch.logsumexp(at_least_float32(each).log_softmax(dim=-1) + log_weights, dim=1)[0] for each in logits]
