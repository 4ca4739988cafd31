"""Video models of transformers: VideoMAE (arXiv 2203.12602), V-JEPA 2 (2506.09985), TimeSformer (2102.05095).

Frames of the recipe's inputs, ImageNet-normalised, get the model's own normalisation. A model of fewer frames takes
one of each group of consecutive frames. Tokens are ordered by time, then row, then column, without class token.

Legend: N clips, F frames, G frames of the model, S side, T tokens, P tokens of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.modalities.video.tensor import IMAGENET_MEAN, IMAGENET_STD
from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.models.encoders.pretrained.family import (
    Family,
    Normalisation,
    PretrainedModel,
    PretrainedOptions,
    Renormalise,
    side_of,
)
from karmma_dist.recipe import InputRecipe

IMAGENET = Normalisation(IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class VideoFamily(Family):
    """A family of video models."""

    frames_field: str = "num_frames"
    side_field: str = "image_size"
    """Fields of config.json with the number of frames and their side."""
    takes_any_size: bool = False
    """True if positions are computed, so that both follow the recipe's inputs; otherwise the inputs must fit them."""
    has_class_token: bool = False
    """True if the first token is a class token, which is dropped."""
    is_by_place: bool = False
    """True if the model's tokens are ordered by row, column, then time."""


_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}

VIDEOMAE = VideoFamily(
    name="hf_videomae",
    model_type="videomae",
    config_class="VideoMAEConfig",
    model_class="VideoMAEModel",
    architectures={"base": _BASE, "small": _SMALL, "large": _LARGE, "huge": _HUGE},
    normalisation=IMAGENET,
    prefixes=("videomae.",),
    dropped=("classifier.*", "fc_norm.*", "decoder.*", "encoder_to_decoder.*", "mask_token"),
    free=("decoder_*", "norm_pix_loss"),
    renamed={r"\.q_bias$": ".query.bias", r"\.v_bias$": ".value.bias"},
)

def _vjepa2(width: int, num_layers: int, num_heads: int, mlp_ratio: float) -> dict[str, Any]:
    """Return an architecture of V-JEPA 2 without the layers of its predictor, which is not used."""
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": num_heads}
    return {**sizes, "mlp_ratio": mlp_ratio, "pred_num_hidden_layers": 0}


VJEPA2 = VideoFamily(
    name="hf_vjepa2",
    model_type="vjepa2",
    config_class="VJEPA2Config",
    model_class="VJEPA2Model",
    architectures={
        "vitl": _vjepa2(1024, 24, 16, 4.0),
        "vith": _vjepa2(1280, 32, 16, 4.0),
        "vitg": _vjepa2(1408, 40, 22, 48 / 11),
    },
    normalisation=IMAGENET,
    prefixes=("vjepa2.encoder.", "encoder."),
    dropped=("predictor.*", "vjepa2.predictor.*", "pooler.*", "classifier.*"),
    free=("crop_size", "frames_per_clip", "pred_*", "num_pooler_layers"),
    part="encoder",
    frames_field="frames_per_clip",
    side_field="crop_size",
    takes_any_size=True,
)
TIMESFORMER = VideoFamily(
    name="hf_timesformer",
    model_type="timesformer",
    config_class="TimesformerConfig",
    model_class="TimesformerModel",
    architectures={
        "base": {**_BASE, "num_frames": 8, "image_size": 224},
        "hr": {**_BASE, "num_frames": 16, "image_size": 448},
    },
    normalisation=Normalisation((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
    prefixes=("timesformer.",),
    dropped=("classifier.*",),
    free=(),
    has_class_token=True,
    is_by_place=True,
)


class PickedFrames(nn.Module):
    """The frames that a model takes of a clip, with its normalisation: the middle one of each group of consecutive
    frames.

    Args:
        num_frames: F.
        num_picked: G, which divides F.
        side: S.
        normalisation: Normalisation of the model.
    """

    def __init__(self, num_frames: int, num_picked: int, side: int, normalisation: Normalisation) -> None:
        super().__init__()
        self.expected = (3, num_frames, side, side)
        self.every = num_frames // num_picked
        self.renormalise = Renormalise(IMAGENET, normalisation)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, G, 3, S, S) of ImageNet-normalised (N, 3, F, S, S).

        Raises:
            ValueError: the frames do not have the size for which the encoder was built.
        """
        if x.shape[1:] != self.expected:
            raise ValueError(f"a clip's frames are {tuple(x.shape[1:])}, expected {self.expected}")
        picked: Tensor = self.renormalise(x[:, :, (self.every - 1) // 2 :: self.every])
        return picked.transpose(1, 2)


class VideoModel(PretrainedModel):
    """A video model of transformers: (N, 3, F, S, S) -> (N, T, D).

    Args:
        family: The family's record.
        modality: Modality that is encoded, for messages.
        options: Options of the recipe.
        num_frames: F.
        side: S.

    Raises:
        UserError: the model does not take such frames.
    """

    family: VideoFamily

    def __init__(
        self, family: VideoFamily, modality: str, options: PretrainedOptions, num_frames: int, side: int
    ) -> None:
        followed = {family.frames_field: num_frames, family.side_field: side} if family.takes_any_size else {}
        super().__init__(family, modality, options, followed)
        if getattr(self.config, "attention_type", "") == "space_only":
            raise UserError(f"{self.where}.options.config.attention_type: space_only gives no token per frame")
        self.num_frames, self.side = num_frames, side
        tubelet = getattr(self.config, "tubelet_size", 1)
        patch = side_of(self.config.patch_size, "patch_size", self.where)
        self.num_model_frames = getattr(self.config, family.frames_field)
        self._check_sizes(tubelet, patch)
        self.num_steps = self.num_model_frames // tubelet
        self.num_tokens = self.num_steps * (side // patch) ** 2
        self.pick = PickedFrames(num_frames, self.num_model_frames, side, self.normalisation)
        _keep_positions_on_device(self.model)

    def _check_sizes(self, tubelet: int, patch: int) -> None:
        side = side_of(getattr(self.config, self.family.side_field), self.family.side_field, self.where)
        num = self.num_model_frames
        if side != self.side:
            problem = f"frames with a side of {side} pixels, not {self.side}: set the crop of inputs to {side}"
        elif side % patch:
            problem = f"whole patches of {patch} pixels, not a side of {side}: set the crop of inputs to a multiple"
        elif self.num_frames % num:
            problem = f"{num} frames, of which {self.num_frames} are no multiple: set num_frames of inputs to one"
        elif num % tubelet:
            problem = f"whole groups of {tubelet} frames, not {num}: set num_frames of inputs to a multiple"
        else:
            return
        raise UserError(f"{self.where}: {self.family.name} takes {problem}")

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, 3, F, S, S) to (N, T, D).

        Raises:
            ValueError: the frames do not have the size for which the encoder was built.
        """
        tokens: Tensor = self.model(self.pick(x)).last_hidden_state
        if self.family.has_class_token:
            tokens = tokens[:, 1:]
        if self.family.is_by_place:
            tokens = tokens.unflatten(1, (-1, self.num_steps)).transpose(1, 2).flatten(1, 2)  # (N, G * P, D)
        return tokens


def _keep_positions_on_device(model: nn.Module) -> None:
    """Make fixed positions that a model keeps as a plain tensor a buffer, so that no step copies them to the device."""
    name, embeddings = "position_embeddings", getattr(model, "embeddings", None)
    if isinstance(embeddings, nn.Module) and isinstance(embeddings.__dict__.get(name), Tensor):
        positions = embeddings.__dict__.pop(name)
        embeddings.register_buffer(name, positions.to(torch.empty(0).device), persistent=False)


def _build(family: VideoFamily) -> Callable[[str, InputRecipe, PretrainedOptions], Encoder]:
    def build(modality: str, inputs: InputRecipe, options: PretrainedOptions) -> Encoder:
        frames = inputs.section(modality)
        return VideoModel(family, modality, options, frames.num_frames, frames.crop)

    return build


VIDEO_MODELS: Mapping[str, EncoderType] = {
    family.name: EncoderType(PretrainedOptions, ("frames",), _build(family))
    for family in (VIDEOMAE, VJEPA2, TIMESFORMER)
}
