"""Tests of the audio models of transformers: spectrograms and tokens are the library's own, from the waveform on.

Models are tiny, of random weights, and written as the library writes a folder of the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.pretrained.audio import AUDIO_MODELS
from karmma_dist.models.encoders.table import build_encoder, input_shape
from karmma_dist.models.flops import flops_per_clip
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.weights import load_encoder_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe
from kits.hub_folders import TOLERANCE, change

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'karmma-dist[encoders]'")

NUM_MELS, SAMPLES = 32, 7_360
AST_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
AST_CONFIG = {**AST_SIZES, "num_mel_bins": NUM_MELS}
WHISPER_CONFIG = {
    "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": NUM_MELS,
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A tiny published model, which takes windows of `SAMPLES` samples."""

    name: str
    config: dict[str, Any]
    spectrogram: str
    num_steps: int
    make: Callable[[int], nn.Module]
    """Makes the model that is saved, for a number of steps."""
    extractor: Callable[[int], Any]
    """Makes the library's feature extractor, for a number of steps."""
    field: str
    """The extractor's result."""
    tokens: Callable[[Any, Tensor], Tensor]
    """The library's own tokens (W, P, D) of its features."""


def ast_tokens(model: Any, features: Tensor) -> Tensor:
    out = model.audio_spectrogram_transformer(features)
    return torch.cat([out.pooler_output[:, None], out.last_hidden_state[:, 2:]], dim=1)


def small_whisper(num_steps: int) -> nn.Module:
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 51_865}
    config = transformers.WhisperConfig(**WHISPER_CONFIG, **decoder, max_source_positions=num_steps // 2)
    model: nn.Module = transformers.WhisperModel(config)
    return model


def ast(num_steps: int) -> nn.Module:
    config = transformers.ASTConfig(**AST_CONFIG, max_length=num_steps)
    model: nn.Module = transformers.ASTForAudioClassification(config)
    return model


MODELS = {
    "ast": Published(
        "hf_ast", AST_CONFIG, "kaldi", 1 + (SAMPLES - 400) // 160, ast,
        lambda num_steps: transformers.ASTFeatureExtractor(num_mel_bins=NUM_MELS, max_length=num_steps),
        "input_values", ast_tokens,
    ),
    "whisper": Published(
        "hf_whisper", WHISPER_CONFIG, "whisper", SAMPLES // 160, small_whisper,
        lambda _: transformers.WhisperFeatureExtractor(feature_size=NUM_MELS),
        "input_features", lambda model, features: model.encoder(features).last_hidden_state,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("kind", MODELS)


def inputs_of(kind: str, samples: int = SAMPLES, **changed: Any) -> InputRecipe:
    audio = {"num_windows": 2, "window_s": samples / 16_000, "num_mels": NUM_MELS}
    return InputRecipe.model_validate({"audio": {**audio, "spectrogram": MODELS[kind].spectrogram, **changed}})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Models with the folders that hold them, by kind."""
    transformers.utils.logging.disable_progress_bar()
    made = {}
    for kind, record in MODELS.items():
        torch.manual_seed(0)
        model: Any = record.make(record.num_steps).eval()
        for name, parameter in model.named_parameters():
            if "decoder" not in name:
                nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        made[kind] = (model, folder)
    return made


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def encoder_of(kind: str, inputs: InputRecipe | None = None, **options: Any) -> Encoder:
    record = MODELS[kind]
    recipe = EncoderRecipe(name=record.name, frozen=True, options={"config": record.config, **options})
    return build_encoder("audio", recipe, inputs or inputs_of(kind)).eval()


def loaded(kind: str, folder: Path, inputs: InputRecipe | None = None) -> Encoder:
    encoder = encoder_of(kind, inputs)
    load_encoder_weights(encoder, "audio", str(folder))
    return encoder


def windows_of(num_clips: int, samples: int = SAMPLES) -> Tensor:
    """Return int16 windows (N, 2, samples) of tones and noise."""
    torch.manual_seed(1)
    times = torch.arange(samples) / 16_000
    tones = torch.sin(2 * torch.pi * torch.rand(num_clips, 2, 1) * 3000 * times)
    return ((0.5 * tones + 0.1 * torch.randn(num_clips, 2, samples)) * 8000).to(torch.int16)


def tensor_of(kind: str, windows: Tensor, inputs: InputRecipe | None = None) -> Tensor:
    """Return the spectrograms that an encoder gets."""
    section = (inputs or inputs_of(kind)).audio
    return MODALITIES["audio"].tensors.make(windows, section, None)


def own_features(kind: str, windows: Tensor) -> Tensor:
    """Return the library's features of each window."""
    record = MODELS[kind]
    waves = [wave.astype(np.float32) for wave in (windows.flatten(0, 1).numpy() / 32768)]
    extract = record.extractor(record.num_steps)
    settings = {} if kind == "ast" else {"padding": "longest"}
    features: Tensor = extract(waves, sampling_rate=16_000, return_tensors="pt", **settings)[record.field]
    return features


@EVERY
def test_spectrograms_are_those_of_the_library(kind: str) -> None:
    windows = windows_of(2)
    features = own_features(kind, windows)
    ours = tensor_of(kind, windows)
    assert ours.shape[1:] == input_shape("audio", inputs_of(kind)) == (2, NUM_MELS, MODELS[kind].num_steps)
    theirs = features.transpose(1, 2) if kind == "ast" else features
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=2e-4, rtol=0)


@EVERY
def test_silence_has_finite_spectrograms(kind: str) -> None:
    assert tensor_of(kind, torch.zeros(1, 2, SAMPLES, dtype=torch.int16)).isfinite().all()


@EVERY
def test_tokens_are_those_of_the_library_on_the_same_spectrograms(
    kind: str, published: dict[str, tuple[Any, Path]]
) -> None:
    model, folder = published[kind]
    encoder, x = loaded(kind, folder), tensor_of(kind, windows_of(3))
    features = x.flatten(0, 1)
    expected = MODELS[kind].tokens(model, features.transpose(1, 2) if kind == "ast" else features)
    tokens = encoder(x)
    assert tokens.shape == (3, encoder.num_tokens, encoder.width)
    torch.testing.assert_close(tokens, expected.unflatten(0, (3, 2)).flatten(1, 2), **TOLERANCE)
    torch.testing.assert_close(tokens, torch.cat([encoder(clip[None]) for clip in x]), **TOLERANCE)
    assert not torch.allclose(tokens[0], tokens[1])


@EVERY
def test_every_tensor_of_the_file_is_in_the_encoder_or_of_another_part(
    kind: str, published: dict[str, tuple[Any, Path]]
) -> None:
    encoder, state = loaded(kind, published[kind][1]), load_file(published[kind][1] / "model.safetensors")
    own = sorted(tensor.numpy().tobytes() for tensor in encoder.state_dict().values())
    kept = [tensor for key, tensor in state.items() if not key.startswith(("classifier", "decoder"))]
    assert own == sorted(tensor.numpy().tobytes() for tensor in kept)


@EVERY
def test_shorter_windows_keep_a_part_of_the_positions(kind: str, published: dict[str, tuple[Any, Path]]) -> None:
    """AST's own code keeps the middle ones, Whisper's the first; a longer window than the model's is refused."""
    samples = SAMPLES - 160 * 14
    encoder = loaded(kind, published[kind][1], inputs_of(kind, samples))
    windows = windows_of(1, samples)
    assert encoder(tensor_of(kind, windows, inputs_of(kind, samples))).shape[1] == encoder.num_tokens
    state = encoder.state_dict()
    if kind == "ast":
        whole = published[kind][0].audio_spectrogram_transformer.embeddings.position_embeddings
        grid = whole[:, 2:].unflatten(1, (2, 3))  # bands, steps
        part = state["model.embeddings.position_embeddings"][:, 2:].unflatten(1, (2, -1))
        assert torch.equal(part, grid[:, :, 1 - part.shape[2] // 2 :][:, :, : part.shape[2]])
    else:
        whole = published[kind][0].encoder.embed_positions.weight
        assert torch.equal(state["model.embed_positions.weight"], whole[: encoder.num_tokens // 2])
    with pytest.raises(UserError, match="position"):
        loaded(kind, published[kind][1], inputs_of(kind, SAMPLES + 160 * 20))


@EVERY
def test_a_missing_key_is_named(kind: str, published: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    folder = tmp_path / kind
    published[kind][0].save_pretrained(folder)
    key = next(key for key in load_file(folder / "model.safetensors") if "encoder.layer" in key and ".1." in key)
    change(folder, lambda state: state.pop(key))
    with pytest.raises(UserError, match=r"1 keys are missing \(model\.layers\.1\."):
        loaded(kind, folder)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("ast", {"spectrogram": "paper"}, "another spectrogram than paper: set spectrogram of its inputs to kaldi"),
        ("whisper", {"num_mels": 16}, "takes 32 mel bands, not 16"),
        ("ast", {"window_s": 0.1}, "hf_ast cuts patches of 16 x 16"),
        ("whisper", {"window_s": 0.05}, "takes an even number of steps, not 5"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(kind: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        encoder_of(kind, inputs_of(kind, **changed))
    assert "\n" not in str(error.value)
    assert "model.encoders.audio" in str(error.value)


@EVERY
def test_a_frozen_model_stays_in_eval_mode_and_counts_its_flops(kind: str) -> None:
    recipe = EncoderRecipe(name=MODELS[kind].name, frozen=True, options={"config": MODELS[kind].config})
    sizes: dict[str, Any] = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16}
    models = [
        KarmmaModel(
            ModelRecipe(encoders={"audio": recipe}, **sizes), inputs_of(kind, num_windows=num), ["audio"], {"action": 3}
        )
        for num in (4, 2)
    ]
    assert not any(module.training for module in models[0].train().encoders["audio"].modules())
    whole, half = (flops_per_clip(model).encoders["audio"] for model in models)
    assert whole == 2 * half > 0


def test_the_table_holds_every_family() -> None:
    assert {record.name for record in MODELS.values()} == set(AUDIO_MODELS)
