"""The rivals of KARMMA: other ways to bear a missing modality, in the same model, so that one study compares them.

    missing: zeros           zeros in the fusion block; no module
    missing: mean            `MeanTokens`, the training clips' mean
    missing: token           `MissingToken`, one learnable token (arXiv 2401.11470)
    missing: prompts         `Prompts` of the set of present modalities (arXiv 2303.03369)
    fusion: late             unimodal predictions, averaged over the present modalities; `HeadColumns`
    fusion: bottleneck       `BottleneckFusion` (arXiv 2107.00135)

What holds for KARMMA's own parts holds for these: the content of an absent modality reaches no prediction, and every
parameter gets a gradient, zeros if unused, at the same point of the backward pass on every rank.

Legend: B clips, M modalities, K of them whose tokens are in the fusion block, N clips that have a modality, T tokens,
D width, L layers with prompts, P prompts of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from karmma_dist.models.encoders.transformer import INIT_STD, TransformerLayer, init_linears
from karmma_dist.models.running_sums import RunningSums

_MEAN_DECAY = 0.99
"""Factor per optimizer step of the mean of an encoder's tokens in training: tokens of 100 steps ago count a third."""


class Filler(nn.Module, ABC):
    """The tokens that replace a missing modality's; unlike `StandIn` it adds nothing to the tokens of present ones."""

    def forward(self, tokens_BTD: Tensor, keep_B: Tensor, projection: nn.Module) -> Tensor:
        """Return (B, T, D).

        Args:
            tokens_BTD: Tokens in batch order.
            keep_B: bool, True = the clip has the modality; on any device. The tokens of other clips are replaced.
            projection: Linear between encoder and fusion block.
        """
        keep_B11 = keep_B.to(tokens_BTD.device)[:, None, None]
        return torch.where(keep_B11, tokens_BTD, self.replacement(projection, tokens_BTD.dtype).to(tokens_BTD.dtype))

    @abstractmethod
    def replacement(self, projection: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return the tokens (1, T, D) or (1, 1, D) that replace those of a missing modality."""

    def observe(self, tokens_NTD: Tensor) -> None:
        """Take note of an encoder's tokens of training clips, before the projection."""


class MissingToken(Filler):
    """One learnable token, repeated at all positions (Missing Modality Token, arXiv 2401.11470).

    The paper replaces a modality's tokens at random in training; here modality dropout does, which spares the encoder
    as well. The paper's backbone is `fusion: bottleneck`; here the fusion block takes the token too.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.token, std=INIT_STD)

    def replacement(self, projection: nn.Module, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """Return the token, (1, 1, D)."""
        return self.token


class MeanTokens(Filler):
    """The mean tokens of the training clips that have the modality, one for each position [ours].

    The mean is taken of the encoder's tokens and then projected, which is the mean of the projected tokens for the
    current weights of the projection. Of a frozen encoder it is the mean over all clips of all steps so far; of one in
    training over the latest steps. Until the first step it is zeros.

    Args:
        num_tokens: T.
        width: Width of the encoder's tokens.
        frozen: True if the encoder is frozen.
    """

    def __init__(self, num_tokens: int, width: int, *, frozen: bool) -> None:
        super().__init__()
        self._shape = (num_tokens, width)
        self.totals = RunningSums(num_tokens * width + 1, decay=1.0 if frozen else _MEAN_DECAY)  # the last counts clips

    def observe(self, tokens_NTD: Tensor) -> None:
        """Add the clips' tokens to the totals of this step."""
        tokens = tokens_NTD.detach().double()
        self.totals.add(torch.cat([tokens.sum(dim=0).flatten(), tokens.new_tensor([len(tokens)])]))

    def replacement(self, projection: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return the projected mean, (1, T, D)."""
        totals, num = self.totals.sums[:-1], self.totals.sums[-1]
        mean = totals / torch.where(num > 0, num, 1.0)
        projected: Tensor = projection(mean.to(dtype).reshape(1, *self._shape))
        return projected


class Prompts(nn.Module):
    """Learnable prompts for each set of present modalities (missing-aware prompts, arXiv 2303.03369).

    As in the paper's input-level prompting each of the first layers gets prompts of its own before its input, those of
    earlier layers stay, and each missing case has a set of prompts, 2^M - 1 in total. (arXiv 2312.15890 has one set per
    modality, so that many modalities do not need too many; datasets have few.) Unlike there, missing modalities have no
    dummy input but are left out of attention, and the fusion block is trained as well: it has no pretrained weights.

    Args:
        num_modalities: M.
        num_layers: L.
        num_prompts: P.
        width: D.
    """

    def __init__(self, num_modalities: int, num_layers: int, num_prompts: int, width: int) -> None:
        super().__init__()
        self.prompt_tokens = nn.Parameter(torch.empty(2**num_modalities - 1, num_layers, num_prompts, width))
        nn.init.trunc_normal_(self.prompt_tokens, std=INIT_STD)

    def forward(self, keep_BM: Tensor) -> Tensor:
        """Return the prompts (B, L, P, D) of each clip's set of modalities.

        Args:
            keep_BM: bool, True = the clip has the modality, one at least; on any device.
        """
        sets_B = (keep_BM.long() << torch.arange(keep_BM.shape[1], device=keep_BM.device)).sum(dim=1)
        return self.prompt_tokens.index_select(0, (sets_B - 1).to(self.prompt_tokens.device))


class BottleneckFusion(nn.Module):
    """A transformer per modality; they exchange information through bottleneck tokens (MBT, arXiv 2107.00135).

    In each layer from `first` on a modality attends to its own tokens and to the bottleneck tokens, which then become
    the mean of what the clip's modalities have made of them. The prediction is the average over the modalities' [CLS]
    tokens. In the paper the layers before the bottleneck are those of pretrained ViTs; here they are encoders of any
    kind, and the transformers start at random. Missing modalities, which the paper does not treat, take no part in
    either mean.

    Args:
        num_modalities: M.
        width: D.
        num_heads: Number of attention heads.
        num_layers: Number of layers.
        feedforward: Feed-forward width.
        attention_dropout: Dropout on attention weights while training.
        num_tokens: Number of bottleneck tokens.
        first: First layer with bottleneck tokens, counted from 0.
    """

    def __init__(
        self, num_modalities: int, width: int, num_heads: int, num_layers: int, feedforward: int,
        attention_dropout: float, *, num_tokens: int, first: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self._num_layers, self._first = num_layers, first
        self.cls_tokens = nn.Parameter(torch.empty(num_modalities, 1, width))
        self.bottleneck_tokens = nn.Parameter(torch.empty(1, num_tokens, width))
        self.transformers = nn.ModuleList(
            nn.ModuleList(
                TransformerLayer(width, num_heads, feedforward, pre_norm=True, attention_dropout=attention_dropout)
                for _ in range(num_layers)
            )
            for _ in range(num_modalities)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_modalities))
        init_linears(self)
        for tokens in (self.cls_tokens, self.bottleneck_tokens):
            nn.init.trunc_normal_(tokens, std=INIT_STD)

    def forward(self, parts: Sequence[Tensor], columns: Sequence[int], counted_BK: Tensor) -> Tensor:
        """Return the [CLS] token of each modality after the last layer, (B, K, D).

        Args:
            parts: Tokens (B, T, D) of K modalities.
            columns: Places of these modalities among the M.
            counted_BK: bool, True = the clip has the modality, or something replaces it; its output is meaningless
                otherwise.
        """
        shares_BK = counted_BK.to(parts[0]) / counted_BK.sum(dim=1, keepdim=True).to(parts[0])
        num_clips, num_shared = len(parts[0]), self.bottleneck_tokens.shape[1]
        shared = self.bottleneck_tokens.expand(num_clips, -1, -1)
        alone = [
            torch.cat([self.cls_tokens[m].expand(num_clips, -1, -1), part], dim=1)
            for m, part in zip(columns, parts, strict=True)
        ]
        for depth in range(self._num_layers):
            layers = [self._layer(m, depth) for m in columns]
            if depth < self._first:
                alone = [layer(x) for layer, x in zip(layers, alone, strict=True)]
                continue
            mixed = [layer(torch.cat([shared, x], dim=1)) for layer, x in zip(layers, alone, strict=True)]
            written = torch.stack([x[:, :num_shared] for x in mixed], dim=1)  # (B, K, bottleneck tokens, D)
            shared = (written * shares_BK[:, :, None, None]).sum(dim=1)
            alone = [x[:, num_shared:] for x in mixed]
        return torch.cat([self.norms[m](x[:, :1]) for m, x in zip(columns, alone, strict=True)], dim=1)

    def _layer(self, m: int, depth: int) -> nn.Module:
        layers = self.transformers[m]
        assert isinstance(layers, nn.ModuleList)
        return layers[depth]


class HeadColumns(nn.Module):
    """A classifier that was applied already: the columns of one head among the logits of all heads.

    Args:
        start: First column.
        num: Number of classes.
    """

    def __init__(self, start: int, num: int) -> None:
        super().__init__()
        self._columns = slice(start, start + num)

    def forward(self, logits_BMA: Tensor) -> Tensor:
        """Return the head's logits, (B, M, C)."""
        return logits_BMA[..., self._columns]


def head_columns(heads: dict[str, int]) -> dict[str, HeadColumns]:
    """Return the columns of each head in logits of all heads side by side."""
    starts = dict(zip(heads, [sum(list(heads.values())[:place]) for place in range(len(heads))], strict=True))
    return {head: HeadColumns(starts[head], num) for head, num in heads.items()}
