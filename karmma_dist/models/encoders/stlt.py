"""STLT: spatial and temporal transformers over detected boxes (arXiv 2111.01936 and its public code).

The boxes of one frame, preceded by a box around the whole frame, go through the spatial layers. Their output for the
whole frame, plus position and frame type, goes through the temporal layers, where a frame attends to itself and to
earlier frames. A last, empty frame attends to all others. Width 768, 12 heads, feed-forward 3072, GELU, post-norm.

Legend: N clips, F frames, O boxes, T tokens, D width.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.models.encoders.transformer import INIT_STD, TransformerLayer, init_linears
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Positive, Settings

_NUM_CATEGORIES, _WHOLE_FRAME = 4, 3
"""Number of categories (padding, hand, object, whole frame), and the category of the box around the whole frame."""
_NUM_FRAME_TYPES, _REGULAR, _EMPTY, _LAST = 5, 2, 3, 4
_EPS = 1e-12


class StltOptions(Settings):
    """Options of stlt. The teacher has 4 + 8 layers [paper: 12], the student 3 + 6 [paper: 9, ours: the split]."""

    spatial_layers: Positive = 3
    """Layers over the boxes of one frame."""
    temporal_layers: Positive = 6
    """Layers over frames."""
    width: Positive = 768
    """D."""
    heads: Positive = 12
    """Attention heads."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout in training, on embeddings, attention weights and layers [Radevski]."""

    @model_validator(mode="after")
    def _heads_divide(self) -> StltOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Stlt(Encoder):
    """STLT: boxes (N, F, O, 6) -> one token per frame and one for the whole clip.

    Args:
        num_frames: F.
        options: Sizes.
    """

    def __init__(self, num_frames: int, options: StltOptions) -> None:
        super().__init__()
        width = options.width
        self.width, self.num_tokens = width, num_frames + 1
        self._recompute = False
        self.category = nn.Embedding(_NUM_CATEGORIES, width, padding_idx=0)
        self.box = nn.Linear(4, width)
        self.score = nn.Linear(1, width)
        self.box_norm = nn.LayerNorm(width, eps=_EPS)
        self.spatial = _layers(options.spatial_layers, options)
        self.position = nn.Embedding(self.num_tokens, width)
        self.frame_type = nn.Embedding(_NUM_FRAME_TYPES, width, padding_idx=0)
        self.frame_norm = nn.LayerNorm(width, eps=_EPS)
        self.temporal = _layers(options.temporal_layers, options)
        self.dropout = nn.Dropout(options.dropout)
        init_linears(self)
        for embedding in (self.category, self.position, self.frame_type):
            nn.init.trunc_normal_(embedding.weight, std=INIT_STD)
        with torch.no_grad():
            self.category.weight[0] = 0
            self.frame_type.weight[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Encode boxes (N, F, O, 6) to (N, T, D).

        A box is x0 y0 x1 y1 as fractions of the frame, category (0 padding, 1 hand, 2 object), score.
        """
        boxes = _with_whole_frames(x)  # (N, F + 1, O + 1, 6)
        categories = boxes[..., 4].long()
        types = _frame_types(categories)
        layout = self._spatial(boxes, categories)
        num_frames = layout.shape[1]
        positions = self.position(torch.arange(num_frames, device=layout.device))
        h = self.dropout(self.frame_norm(layout + positions + self.frame_type(types)))
        earlier = torch.ones(1, num_frames, num_frames, dtype=torch.bool, device=h.device).tril()
        return self._through(self.temporal, h, earlier)

    def checkpoint_activations(self) -> None:
        """Keep only the input of each layer, and recompute its activations in the backward pass."""
        self._recompute = True

    def _through(self, layers: nn.ModuleList, h: Tensor, attend: Tensor) -> Tensor:
        for layer in layers:
            if self._recompute and torch.is_grad_enabled():
                h = checkpoint(layer, h, attend, use_reentrant=False)
            else:
                h = layer(h, attend)
        return h

    def _spatial(self, boxes: Tensor, categories: Tensor) -> Tensor:
        """Encode the boxes of each frame, (N, F + 1, O + 1, 6), to one token of the whole frame, (N, F + 1, D)."""
        h = self.category(categories) + self.box(boxes[..., :4]) + self.score(boxes[..., 5:])
        h = self.dropout(self.box_norm(h)).flatten(0, 1)
        is_box = (categories > 0).flatten(0, 1)[:, None]  # (N * (F + 1), 1, O + 1)
        h = self._through(self.spatial, h, is_box)
        return h[:, 0].unflatten(0, boxes.shape[:2])

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the public code's whole model or backbone, and cut off surplus positions.

        Action Genome's tables have other rows: pad, cls, objects 2 to 36, person; pad, regular, extract, empty. They
        move to our rows of the same meaning [ours]; the missing frame type "start" keeps its random row.
        """
        kept = _renamed(state)
        if "position.weight" in kept:
            kept["position.weight"] = kept["position.weight"][: self.num_tokens]
        if _is_of_action_genome(kept):
            kept["category.weight"] = _our_categories(kept["category.weight"])
            kept["frame_type.weight"] = self._our_frame_types(kept["frame_type.weight"])
        return kept

    def moved_rows(self, state: dict[str, Tensor]) -> str:
        """Return a sentence on Action Genome's tables, whose rows `from_published` moves; empty for others."""
        if not _is_of_action_genome(_renamed(state)):
            return ""
        return (
            "Action Genome's tables: hand takes the row of person, object the mean of objects 2 to 36, whole frame the "
            "row of cls; frame types regular, empty and extract take their own rows, start stays random"
        )

    def _our_frame_types(self, theirs: Tensor) -> Tensor:
        """Map rows pad, regular, extract, empty to pad, start, regular, empty, extract."""
        ours = self.frame_type.weight.detach().to(theirs).clone()
        ours[0] = 0
        ours[[_REGULAR, _LAST, _EMPTY]] = theirs[[1, 2, 3]]
        return ours


_AG_CATEGORIES, _AG_FRAME_TYPES = 38, 4
"""Numbers of rows in the tables of a checkpoint pretrained on Action Genome."""


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the public code's tensors under our keys, without those that our model lacks."""
    kept: dict[str, Tensor] = {}
    for published, tensor in state.items():
        key = published.removeprefix("stlt_backbone.").removeprefix("backbone.")
        if key.startswith("prediction_head.") or ".encoder_layer." in key or key.endswith("position_ids"):
            continue
        for theirs, ours in _PUBLISHED:
            key = key.replace(theirs, ours)
        kept[key] = tensor
    return kept


def _is_of_action_genome(state: dict[str, Tensor]) -> bool:
    """Return True if the tables of a renamed checkpoint have Action Genome's rows."""
    sizes = [len(state[key]) if key in state else 0 for key in ("category.weight", "frame_type.weight")]
    return sizes == [_AG_CATEGORIES, _AG_FRAME_TYPES]


def _our_categories(theirs: Tensor) -> Tensor:
    """Map rows pad, cls, objects 2 to 36, person to pad, hand, object, whole frame."""
    return torch.stack([torch.zeros_like(theirs[0]), theirs[37], theirs[2:37].mean(dim=0), theirs[1]])


_PUBLISHED = (
    ("frames_embeddings.layout_embedding.category_box_embeddings.category_embeddings.", "category."),
    ("frames_embeddings.layout_embedding.category_box_embeddings.box_embedding.", "box."),
    ("frames_embeddings.layout_embedding.category_box_embeddings.score_embeddings.", "score."),
    ("frames_embeddings.layout_embedding.category_box_embeddings.layer_norm.", "box_norm."),
    ("frames_embeddings.layout_embedding.transformer.layers.", "spatial."),
    ("frames_embeddings.position_embeddings.", "position."),
    ("frames_embeddings.frame_type_embedding.", "frame_type."),
    ("frames_embeddings.layer_norm.", "frame_norm."),
    ("transformer.layers.", "temporal."),
    (".self_attn.in_proj_", ".attention.qkv."),
    (".self_attn.out_proj.", ".attention.out."),
)


def _layers(num: int, options: StltOptions) -> nn.ModuleList:
    return nn.ModuleList(
        TransformerLayer(
            options.width,
            options.heads,
            4 * options.width,
            pre_norm=False,
            attention_dropout=options.dropout,
            dropout=options.dropout,
        )
        for _ in range(num)
    )


def _with_whole_frames(boxes: Tensor) -> Tensor:
    """Prepend a box around the whole frame to each frame's boxes, and append a frame without other boxes.

    Every frame then has a box to attend to.
    """
    boxes = F.pad(boxes, (0, 0, 0, 0, 0, 1))  # (N, F + 1, O, 6)
    whole = boxes.new_tensor([0, 0, 1, 1, _WHOLE_FRAME, 1]).expand(*boxes.shape[:2], 1, 6)
    return torch.cat([whole, boxes], dim=2)


def _frame_types(categories: Tensor) -> Tensor:
    """Return the type of each frame, int64 (N, F + 1), from categories (N, F + 1, O + 1): regular, empty or last."""
    types = torch.where((categories[:, :, 1:] > 0).any(dim=2), _REGULAR, _EMPTY)
    last = types.new_full((len(types), 1), _LAST)
    return torch.cat([types[:, :-1], last], dim=1)


def _build(modality: str, inputs: InputRecipe, options: StltOptions) -> Encoder:
    return Stlt(inputs.section(modality).num_frames, options)


STLT = EncoderType(StltOptions, ("boxes",), _build)
