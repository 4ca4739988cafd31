"""Audio models of transformers: AST (arXiv 2104.01778) and the encoder of Whisper (arXiv 2212.04356).

Each needs its own spectrogram, which the recipe's inputs name (`inputs.audio.spectrogram`), and encodes every window of
a clip by itself; the clip's tokens are those of its windows. A window may be shorter than a published model's: then it
keeps a part of the published positions.

Legend: N clips, V windows, W windows of all clips, M mel bands, S steps, P tokens of a window, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.modalities.audio.published import KALDI_MEAN, KALDI_STD
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

_NUM_PREFIX = 2
"""AST's class and distillation token."""
_AST_POSITIONS = "model.embeddings.position_embeddings"
_WHISPER_POSITIONS = "model.embed_positions.weight"


@dataclass(frozen=True)
class AudioFamily(Family):
    """A family of audio models."""

    spectrogram: str = ""
    """Spectrogram on which it was trained, a value of the inputs' field of that name."""


AST = AudioFamily(
    name="hf_ast",
    model_type="audio-spectrogram-transformer",
    config_class="ASTConfig",
    model_class="ASTModel",
    architectures={
        "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    },
    normalisation=Normalisation((KALDI_MEAN,), (KALDI_STD,)),
    prefixes=("audio_spectrogram_transformer.",),
    dropped=("classifier.*",),
    free=("max_length",),
    renamed={
        r"\.encoder\.layer\.": ".layers.",
        r"\.attention\.attention\.(query|key|value)\.": lambda match: f".attention.{match[1][0]}_proj.",
        r"\.attention\.output\.dense\.": ".attention.o_proj.",
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"\.output\.dense\.": ".mlp.fc2.",
    },
    spectrogram="kaldi",
)


def _whisper(width: int, num_layers: int, num_heads: int, num_mels: int = 80) -> dict[str, Any]:
    sizes = {"d_model": width, "encoder_layers": num_layers, "encoder_attention_heads": num_heads}
    return {**sizes, "encoder_ffn_dim": 4 * width, "num_mel_bins": num_mels}


WHISPER = AudioFamily(
    name="hf_whisper",
    model_type="whisper",
    config_class="WhisperConfig",
    model_class="models.whisper.modeling_whisper.WhisperEncoder",
    architectures={
        "base": _whisper(512, 6, 8),
        "tiny": _whisper(384, 4, 6),
        "small": _whisper(768, 12, 12),
        "medium": _whisper(1024, 24, 16),
        "large_v3": _whisper(1280, 32, 20, num_mels=128),
    },
    normalisation=Normalisation((0.0,), (1.0,)),
    prefixes=("model.encoder.", "encoder."),
    dropped=("model.decoder.*", "decoder.*", "proj_out.*"),
    free=(
        "decoder_*", "vocab_size", "max_source_positions", "max_target_positions", "use_cache", "is_encoder_decoder",
        "scale_embedding", "*_token_id", "*suppress_tokens", "use_weighted_layer_sum", "classifier_proj_size",
        "apply_spec_augment", "mask_*", "median_filter_width", "*layerdrop", "tie_word_embeddings", "num_hidden_layers",
        "init_std",
    ),
    spectrogram="whisper",
)  # fmt: skip


class AudioModel(PretrainedModel):
    """The base of both adapters: (N, V, M, S) -> (N, V * P, D).

    Args:
        family: The family's record.
        modality: Modality that is encoded, for messages.
        options: Options of the recipe.
        section: Section of the recipe's inputs.
        sizes: Fields of the configuration that follow the recipe's inputs.

    Raises:
        UserError: the inputs hold another spectrogram than the model's.
    """

    def __init__(
        self, family: AudioFamily, modality: str, options: PretrainedOptions, section: Any, sizes: Mapping[str, Any]
    ) -> None:
        if (given := getattr(section, "spectrogram", None)) != family.spectrogram:
            raise UserError(
                f"model.encoders.{modality}: {family.name} was trained on another spectrogram than {given}: set "
                f"spectrogram of its inputs to {family.spectrogram}"
            )
        super().__init__(family, modality, options, sizes)
        if section.num_mels != self.config.num_mel_bins:
            raise UserError(
                f"{self.where}: {family.name} takes {self.config.num_mel_bins} mel bands, not {section.num_mels}: set "
                "num_mels of its inputs"
            )
        self.shape = (section.num_windows, section.num_mels, section.num_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, V, M, S) to (N, V * P, D).

        Raises:
            ValueError: the spectrograms do not have the size for which the encoder was built.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"a clip's spectrograms are {tuple(x.shape[1:])}, expected {self.shape}")
        return self._encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1, 2)

    @abstractmethod
    def _encode(self, windows_WMS: Tensor) -> Tensor:
        """Return (W, P, D)."""


class AstModel(AudioModel):
    """AST: the mean of class and distillation token, then a token per patch, by mel band, then time."""

    def __init__(self, modality: str, options: PretrainedOptions, section: Any) -> None:
        super().__init__(AST, modality, options, section, {"max_length": section.num_steps})
        patch = side_of(self.config.patch_size, "patch_size", self.where)
        if min(section.num_mels, section.num_steps) < patch:
            raise UserError(f"{self.where}: hf_ast cuts patches of {patch} x {patch}: enlarge window_s of its inputs")
        self.grid = (
            (section.num_mels - patch) // self.config.frequency_stride + 1,
            (section.num_steps - patch) // self.config.time_stride + 1,
        )
        self.num_tokens = section.num_windows * (1 + self.grid[0] * self.grid[1])
        given, own = (Normalisation(n.mean, (2 * n.std[0],)) for n in (AST.normalisation, self.normalisation))
        self.renormalise = Renormalise(given, own)

    def _encode(self, windows_WMS: Tensor) -> Tensor:
        own = self.renormalise(windows_WMS[:, None])[:, 0].transpose(1, 2)  # (W, S, M)
        tokens: Tensor = self.model(own).last_hidden_state
        prefix, patches = tokens.split([_NUM_PREFIX, tokens.shape[1] - _NUM_PREFIX], dim=1)
        return torch.cat([prefix.mean(dim=1, keepdim=True), patches], dim=1)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name the entries as this version of transformers does, and keep the middle of longer positions, as AST does.
        """
        kept = super().from_published(state)
        positions = kept.get(_AST_POSITIONS)
        if positions is not None and positions.ndim == 3:
            prefix, patches = positions[:, :_NUM_PREFIX], positions[:, _NUM_PREFIX:]
            num_steps, rest = divmod(patches.shape[1], self.grid[0])
            if not rest and num_steps > self.grid[1]:
                start = num_steps // 2 - self.grid[1] // 2
                middle = patches.unflatten(1, (self.grid[0], num_steps))[:, :, start : start + self.grid[1]]
                kept[_AST_POSITIONS] = torch.cat([prefix, middle.flatten(1, 2)], dim=1)
        return kept


class WhisperModel(AudioModel):
    """The encoder of Whisper: a token every 20 ms."""

    def __init__(self, modality: str, options: PretrainedOptions, section: Any) -> None:
        if section.num_steps % 2:
            raise UserError(
                f"model.encoders.{modality}: hf_whisper takes an even number of steps, not {section.num_steps}: set "
                "window_s of its inputs to a multiple of 0.02"
            )
        super().__init__(WHISPER, modality, options, section, {"max_source_positions": section.num_steps // 2})
        self.num_tokens = section.num_windows * section.num_steps // 2

    def _encode(self, windows_WMS: Tensor) -> Tensor:
        tokens: Tensor = self.model(windows_WMS).last_hidden_state
        return tokens

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the decoder, and keep the first of longer positions."""
        kept = super().from_published(state)
        if (positions := kept.get(_WHISPER_POSITIONS)) is not None:
            kept[_WHISPER_POSITIONS] = positions[: self.config.max_source_positions]
        return kept


def _build(model: Callable[[str, PretrainedOptions, Any], Encoder]) -> EncoderType:
    def build(modality: str, inputs: InputRecipe, options: PretrainedOptions) -> Encoder:
        return model(modality, options, inputs.section(modality))

    return EncoderType(PretrainedOptions, ("spectrograms",), build)


AUDIO_MODELS: Mapping[str, EncoderType] = {AST.name: _build(AstModel), WHISPER.name: _build(WhisperModel)}
