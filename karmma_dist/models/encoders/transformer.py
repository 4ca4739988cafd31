"""The transformer layer of the fusion block and of the box encoder.

Legend: B sequences, T tokens, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of the truncated normal that initialises learnable tokens."""


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 if it has that dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SelfAttention(nn.Module):
    """Multi-head self-attention on PyTorch's fused kernel.

    Args:
        width: D, a multiple of `num_heads`.
        num_heads: H.
        dropout: Dropout on attention weights while training.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens_BTD: Tensor, attend_BTT: Tensor | None = None) -> Tensor:
        """Return (B, T, D).

        Args:
            tokens_BTD: Tokens.
            attend_BTT: bool, True = this query (row) may attend to this key (column); B and rows of size 1 are
                broadcast. Every query needs one key. None means that every query attends to every key.
        """
        qkv = self.qkv(tokens_BTD).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, D/H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D/H) each
        mask = None if attend_BTT is None else attend_BTT[:, None]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class TransformerLayer(nn.Module):
    """Attention and a two-layer GELU network, each with a residual connection.

    Args:
        width: D.
        num_heads: Attention heads.
        feedforward: Width between the two feed-forward linears.
        pre_norm: True to normalise the input of each half; otherwise each sum is normalised.
        attention_dropout: Dropout on attention weights.
        dropout: Dropout on the output of each half, and inside the feed-forward network.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        feedforward: int,
        *,
        pre_norm: bool,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = SelfAttention(width, num_heads, attention_dropout)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BTD: Tensor, attend_BTT: Tensor | None = None) -> Tensor:
        """Return (B, T, D); `attend_BTT` is that of `SelfAttention`."""
        x = tokens_BTD
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm1(x), attend_BTT))
            return x + self._feedforward(self.norm2(x))
        x = self.norm1(x + self.dropout(self.attention(x, attend_BTT)))
        normed: Tensor = self.norm2(x + self._feedforward(x))
        return normed

    def _feedforward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(x)))))
        return out


def init_linears(module: nn.Module) -> None:
    """Initialise linear weights inside `module` Xavier-uniform and their biases with zero.

    With a fixed deviation of 0.02, usual for wide transformers, narrow ones (64) would not start to learn.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
