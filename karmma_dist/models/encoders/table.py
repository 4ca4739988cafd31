"""The table of encoders, and the shape of each modality's input.

A new encoder is one module with an `EncoderType` and one line in `_OWN`, or an entry point `karmma_dist.encoders`
of another package.
"""

from __future__ import annotations

from karmma_dist.errors import UserError, nearest
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders import ast, signal_cnn, small, stlt, swin3d, temporal
from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.models.encoders.pretrained import frames
from karmma_dist.models.encoders.pretrained.audio import AUDIO_MODELS
from karmma_dist.models.encoders.pretrained.video import VIDEO_MODELS
from karmma_dist.plugins import with_plugins
from karmma_dist.recipe import EncoderRecipe, InputRecipe
from karmma_dist.settings import validate

_OWN = {
    "swin3d_t": swin3d.SWIN3D_T,
    "swin3d_b": swin3d.SWIN3D_B,
    "swin3d_small": swin3d.SWIN3D_SMALL,
    "ast_t": ast.AST_T,
    "stlt": stlt.STLT,
    "small_video": small.SMALL_VIDEO,
    "small_audio": small.SMALL_AUDIO,
    "temporal_video": temporal.TEMPORAL_VIDEO,
    "signal_cnn": signal_cnn.SIGNAL_CNN,
    **VIDEO_MODELS,
    **AUDIO_MODELS,
    "timm_frames": frames.TIMM_FRAMES,
}

ENCODERS: dict[str, EncoderType] = with_plugins(_OWN, "karmma_dist.encoders", EncoderType)


def build_encoder(modality: str, recipe: EncoderRecipe, inputs: InputRecipe) -> Encoder:
    """Build an encoder with random weights (from torch's global generator); `recipe.weights` is not read here.

    Raises:
        UserError: the encoder is unknown, does not accept this modality, does not know an option, or does not support
            activation checkpointing.
    """
    where = f"model.encoders.{modality}"
    kind = ENCODERS.get(recipe.name)
    if kind is None:
        known = ", ".join(ENCODERS)
        raise UserError(f"{where}.name: unknown encoder '{recipe.name}'{nearest(recipe.name, list(ENCODERS))}; "
                        f"there are {known}")
    if modality not in kind.modalities:
        fitting = ", ".join(name for name, other in ENCODERS.items() if modality in other.modalities) or "none"
        raise UserError(
            f"{where}.name: '{recipe.name}' takes {' or '.join(kind.arrays)} and {modality} gives "
            f"{MODALITIES[modality].array}: it does not take {modality}; these do: {fitting}"
        )
    options = validate(recipe.options, kind.options, f"{where}.options ({recipe.name})")
    encoder = kind.build(modality, inputs, options)
    if recipe.activation_checkpointing:
        try:
            encoder.checkpoint_activations()
        except UserError as error:
            raise UserError(f"{where}.activation_checkpointing: {error}") from None
    if recipe.compile:
        encoder.compile()  # in place: parameters keep their names
    return encoder


def input_shape(modality: str, inputs: InputRecipe) -> tuple[int, ...]:
    """Return the shape of one clip's tensor, without the batch dimension (see `karmma_dist.modalities.MODALITIES`).

    Raises:
        UserError: the modality is unknown.
    """
    if modality not in MODALITIES:
        raise UserError(f"unknown modality '{modality}'{nearest(modality, list(MODALITIES))}")
    return MODALITIES[modality].tensors.shape(inputs.section(modality))
