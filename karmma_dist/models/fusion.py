"""The fusion block: a small transformer over [CLS] and the tokens of all modalities (paper, Sec. III-B).

Legend: B clips, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karmma_dist.models.transformer import INIT_STD, TransformerLayer, init_linears


class FusionBlock(nn.Module):
    """Pre-norm transformer with GELU and a final norm [ours: the paper names neither].

    Args:
        width: D.
        num_heads: Attention heads.
        num_layers: Layers.
        feedforward: Feed-forward width.
        attention_dropout: Dropout on attention weights while training [paper: teacher 0.3, student 0].
    """

    def __init__(
        self, width: int, num_heads: int, num_layers: int, feedforward: int, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.layers = nn.ModuleList(
            TransformerLayer(width, num_heads, feedforward, pre_norm=True, attention_dropout=attention_dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        init_linears(self)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)

    def forward(self, tokens_BTD: Tensor, attend_BT: Tensor | None = None) -> Tensor:
        """Mix the tokens of each clip.

        Args:
            tokens_BTD: Tokens of all modalities.
            attend_BT: bool, True = attend to this token; outputs at the others mean nothing. None: to all.

        Returns:
            (B, 1 + T, D), [CLS] first.
        """
        cls = self.cls_token.expand(len(tokens_BTD), -1, -1)
        x = torch.cat([cls, tokens_BTD], dim=1)  # (B, 1 + T, D)
        keys = None if attend_BT is None else nn.functional.pad(attend_BT, (1, 0), value=True)[:, None]  # (B, 1, 1 + T)
        for layer in self.layers:
            x = layer(x, keys)
        out: Tensor = self.norm(x)
        return out
