"""The trunk of AST-T: timm's DeiT-tiny. Imported when a model has one: timm takes longer to load than torch itself."""

from __future__ import annotations

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Trunk(VisionTransformerDistilled):
    """A transformer that returns the tokens after the last norm."""

    recompute = False
    """True if activations inside blocks are recomputed in the backward pass instead of kept."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Encode (N, windows, mels, steps) to (N, 2 + patches, D); timm's mask arguments must keep their defaults."""
        assert attn_mask is None
        assert not is_causal
        if not (self.recompute and torch.is_grad_enabled()):
            tokens: Tensor = self.forward_features(x)
            return tokens
        # Like timm, but always non-reentrant: some versions use reentrant checkpoints, which lose gradients if nothing
        # before a block is trained.
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        normed: Tensor = self.norm(x)
        return normed
