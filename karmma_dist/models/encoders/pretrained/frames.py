"""Image models of timm on the frames of a video, one by one: DINOv2, DINOv3, SigLIP and other models of tokens.

`forward_features` of the model gives the tokens of a frame; a clip's are those of its frames, by time. The name that
timm gives an architecture and its weights (`vit_base_patch14_dinov2.lvd142m`) tells sizes and normalisation; nothing is
downloaded for it.

Legend: N clips, F frames, G frames that are encoded, S side, P tokens of a frame, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from karmma_dist.errors import UserError, nearest, one_line, quoted
from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.models.encoders.pretrained.family import Normalisation, check_normalisation
from karmma_dist.models.encoders.pretrained.video import PickedFrames
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Positive, Settings

_INNER = "model."
_HEADS = ("head.*", "head_dist.*")
"""Patterns of published keys that the encoder does not need."""
_POSITIONS = "model.pos_embed"
_FREE = ("img_size", "num_classes", "in_chans", "global_pool")
"""Arguments of a published config.json that do not change the tokens, or the shapes as well: positions are resized to
the inputs."""


class FramesOptions(Settings):
    """Options of timm_frames."""

    model: str
    """timm's name of the architecture, with its tag, e.g. vit_base_patch14_dinov2.lvd142m."""
    config: dict[str, Any] = {}
    """Further arguments of timm's `create_model`, e.g. {depth: 6}."""
    tokens: Literal["patches", "class"] = "patches"
    """`patches`: a token for each patch of a frame; `class`: the class token alone, one for each frame."""
    num_frames: Positive | None = None
    """Number of frames that are encoded, one of each group of consecutive frames. None: all."""


class FrameModel(Encoder):
    """An image model of timm on each frame: (N, 3, F, S, S) -> (N, G * P, D), by time.

    Args:
        modality: Modality that is encoded, for messages.
        options: Options of the recipe.
        num_frames: F.
        side: S.

    Raises:
        UserError: timm has no such model, or it does not give tokens of such frames.
    """

    reads_folders = True

    def __init__(self, modality: str, options: FramesOptions, num_frames: int, side: int) -> None:
        super().__init__()
        self.where, self.options = f"model.encoders.{modality}", options
        self.num_encoded = options.num_frames or num_frames
        if num_frames % self.num_encoded:
            raise UserError(
                f"{self.where}.options.num_frames: {num_frames} frames of the inputs are no multiple of "
                f"{self.num_encoded}"
            )
        model: Any = _create(options, side, self.where)
        self.num_prefix = _num_prefix_tokens(model, options, self.where)
        if any(side % patch for patch in model.patch_embed.patch_size):
            raise UserError(
                f"{self.where}: {options.model} takes whole patches of {max(model.patch_embed.patch_size)} pixels, not "
                f"a side of {side}: set the crop of inputs to a multiple"
            )
        self.grid = tuple(model.patch_embed.grid_size)
        published = model.pretrained_cfg
        self.normalisation = Normalisation(tuple(published["mean"]), tuple(published["std"]))
        self.pick = PickedFrames(num_frames, self.num_encoded, side, self.normalisation)
        self.width = int(model.num_features)
        self.num_tokens = self.num_encoded * (1 if options.tokens == "class" else self.grid[0] * self.grid[1])
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, 3, F, S, S) to (N, G * P, D).

        Raises:
            ValueError: the frames do not have the size for which the encoder was built.
        """
        tokens: Tensor = self.model.forward_features(self.pick(x).flatten(0, 1))  # (N * G, prefix + P, D)
        kept = tokens[:, :1] if self.options.tokens == "class" else tokens[:, self.num_prefix :]
        return kept.unflatten(0, (-1, self.num_encoded)).flatten(1, 2)

    def check_config(self, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Check that timm's config.json of a published folder describes this encoder.

        Raises:
            UserError: it describes another one.
        """
        own = self.options.model.partition(".")[0]
        if config.get("architecture") != own:
            raise UserError(
                f"config.json says architecture {quoted(config.get('architecture'))} and the recipe '{own}': correct "
                f"{self.where}.options.model"
            )
        arguments = config.get("model_args")
        theirs = arguments if isinstance(arguments, dict) else {}
        for name in sorted({*theirs, *self.options.config} - {*_FREE}):
            if theirs.get(name) != self.options.config.get(name):
                raise UserError(
                    f"config.json says {name} {quoted(theirs.get(name))} and the recipe "
                    f"{quoted(self.options.config.get(name))}: correct {self.where}.options.config.{name}"
                )
        published = config.get("pretrained_cfg")
        check_normalisation(published if isinstance(published, dict) else {}, self.normalisation, self.where)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the head, and resize positions to the grid of this encoder's frames as timm does."""
        kept = {
            _INNER + key: tensor
            for key, tensor in state.items()
            if not any(fnmatchcase(key, pattern) for pattern in _HEADS)
        }
        own = self.state_dict().get(_POSITIONS)
        positions = kept.get(_POSITIONS)
        if own is not None and positions is not None and positions.ndim == 3 and positions.shape != own.shape:
            kept[_POSITIONS] = self._resized(positions, own.shape[1])
        return kept

    def _resized(self, positions_1PD: Tensor, num_positions: int) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        num_prefix = num_positions - self.grid[0] * self.grid[1]
        if round((positions_1PD.shape[1] - num_prefix) ** 0.5) ** 2 != positions_1PD.shape[1] - num_prefix:
            return positions_1PD  # of no square: loading refuses its shape and names the expected one
        resized: Tensor = resample_abs_pos_embed(positions_1PD, list(self.grid), num_prefix_tokens=num_prefix)
        return resized


def _create(options: FramesOptions, side: int, where: str) -> nn.Module:
    """Build timm's model without weights and without head, for frames of this size."""
    import timm

    architecture = options.model.partition(".")[0]
    if not re.fullmatch(r"\w{1,100}(\.[\w-]{1,100})?", options.model) or not timm.is_model(architecture):
        close = nearest(architecture[:100], timm.list_models())
        raise UserError(f"{where}.options.model: timm has no model {quoted(options.model)}{close}")
    arguments = {**options.config, "num_classes": 0, "img_size": side}
    try:
        model: nn.Module = timm.create_model(options.model, pretrained=False, **arguments)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = one_line(error, 300) or type(error).__name__
        raise UserError(
            f"{where}.options.model: timm cannot build {options.model} for frames with a side of {side}: {reason}"
        ) from None
    return model


def _num_prefix_tokens(model: Any, options: FramesOptions, where: str) -> int:
    """Return the number of class and register tokens before those of patches.

    Raises:
        UserError: the model gives no tokens, or no class token where one is wanted.
    """
    num = getattr(model, "num_prefix_tokens", None)
    if not isinstance(num, int) or not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        raise UserError(f"{where}.options.model: {options.model} gives no tokens: choose a vision transformer")
    if options.tokens == "class" and getattr(model, "cls_token", None) is None:
        raise UserError(f"{where}.options.tokens: {options.model} has no class token: choose patches")
    return num


def _build(modality: str, inputs: InputRecipe, options: FramesOptions) -> Encoder:
    frames = inputs.section(modality)
    return FrameModel(modality, options, frames.num_frames, frames.crop)


TIMM_FRAMES = EncoderType(FramesOptions, ("frames",), _build)
