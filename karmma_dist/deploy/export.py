"""The export of a run to one ONNX file that takes any subset of its sensors; the file is described in `model_file`.

Each encoder and the fusion block are traced with PyTorch and put together in `onnx_graph`. The result answers once for
each sensor and once for all of them: a file whose answers differ from those of the run is not written.
"""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from karmma_dist import __version__
from karmma_dist.deploy.clip_model import ClipEncoder, ClipFusion, check_exportable
from karmma_dist.deploy.model_file import BLANK, DIGEST, HEADER, MOST_BYTES, ModelHeader, ModelInput, seal
from karmma_dist.deploy.runtime import Runtime, open_session
from karmma_dist.errors import UserError, one_line
from karmma_dist.evaluation.datasets import choose_dataset
from karmma_dist.evaluation.predict.predict import run_data
from karmma_dist.io.files import sha256_of, write_whole
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import ModelCard, load_model
from karmma_dist.models.weights import own_weights
from karmma_dist.progress import Report, silent
from karmma_dist.runs.folder import run_places
from karmma_dist.seeding import generator
from karmma_dist.shards.folder import ShardFolder, check_classes
from karmma_dist.streaming.loader import open_shards

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

FILE = "model.onnx"
"""Name of the file in a run's folder."""
_TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2}
"""Largest difference between logits of file and run, relative to the largest logit above 1."""


@dataclass(frozen=True)
class Exported:
    """A written file."""

    path: Path
    header: ModelHeader
    num_bytes: int
    parameter_bytes: int
    """Bytes of the model's parameters in float32."""
    largest_difference: float
    """Largest difference of a logit from the run's, on arrays of noise, each sensor alone and all together."""
    warning: str
    """Problem of which the caller should know, or empty."""


def export_run(
    run: Path, out: Path | None = None, *, precision: str = "fp32", shards: str | None = None,
    report: Report = silent,
) -> Exported:  # fmt: skip
    """Write a run's model to one file.

    Args:
        run: Run folder, its best/ folder, or a weights file with a model.yaml in the same folder.
        out: The file; None: model.onnx in the folder of the weights.
        precision: Type of the stored weights, fp32 or fp16; they are computed with as float32.
        shards: Shards folder from which the settings for packing media files are taken; None: the run's own.
        report: Called with the progress.

    Raises:
        UserError: the run has parts that cannot be exported, onnx or onnxruntime is not installed, the model is too
            large for one file, the file's answers differ from the run's, or it cannot be written.
    """
    _check_installed()
    target = run_places(run)[0] / FILE if out is None else out
    _check_target(target)
    model, card, packing, warning = _load(run, shards)
    check_exportable(model)
    header = _header(run, model, card, precision, packing)
    examples = {each.modality: _noise(each) for each in header.modalities}
    content = _serialised(_traced(model, header, examples, report), header)
    report("export", len(header.modalities) + 1, len(header.modalities) + 2)
    difference = _difference(model, Runtime(header, open_session(content, str(target))), examples)
    if not difference <= _TOLERANCE[precision]:
        raise UserError(
            f"{run}: not exported: the file's logits differ from the run's by {difference:.1e}, which is more than "
            f"{_TOLERANCE[precision]:g}"
        )
    write_whole(target, content)
    report("export", len(header.modalities) + 2, len(header.modalities) + 2)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Exported(target, header, len(content), 4 * num_parameters, difference, warning)


def _check_target(path: Path) -> None:
    """Check that a file can be written, before minutes are spent on it.

    Raises:
        UserError: its name or its folder does not allow it.
    """
    if path.suffix != ".onnx":
        raise UserError(f"{path}: the name of the file must end with .onnx")
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: its folder cannot be written")


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'karmma-dist[export]'") from None


def _load(run: Path, shards: str | None) -> tuple[KarmmaModel, ModelCard, dict[str, Any] | None, str]:
    """Return the model, its card, the packing settings of each modality in its shards, and the reason if it has none.

    A model of a mixture is that for the dataset of `shards`.
    """
    model, card = load_model(run)
    data, warning = run_data(run, shards, card), f"{run}: no recipe.yaml with the weights"
    folder: ShardFolder | None = None
    if data is not None and data.mixture:
        dataset = choose_dataset(model, card, data, shards)
        model, card, folder = dataset.model, dataset.card, dataset.folder
    elif data is not None:
        try:
            (folder,) = open_shards(data).folders
            check_classes(card, folder)
        except UserError as error:
            if shards is not None:
                raise
            warning = str(error)
    model.eval().requires_grad_(False)
    if folder is None:
        advice = "so the file does not know how a media file is packed for it: name shards with --shards DIR"
        return model, card, None, f"{warning}: {advice}"
    settings = folder.manifest.header.settings
    return model, card, {name: settings[name] for name in MODALITIES if name in settings}, ""


def _header(
    run: Path, model: KarmmaModel, card: ModelCard, precision: str, packing: dict[str, Any] | None
) -> ModelHeader:
    recipe = run_places(run)[1] / "recipe.yaml"
    inputs = card.inputs.completed(model.modalities)
    return ModelHeader(
        run=card.run,
        precision=precision,
        modalities=tuple(_input(name, model) for name in model.modalities),
        heads=dict(model.heads),
        classes=card.classes,
        inputs=inputs.model_dump(mode="json"),
        packing=packing,
        recipe_sha256=sha256_of(recipe) if recipe.is_file() else None,
        weights_sha256=sha256_of(own_weights(run)),
        versions={
            "karmma-dist": __version__, "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
        },
    )  # fmt: skip


def _input(modality: str, model: KarmmaModel) -> ModelInput:
    entry = MODALITIES[modality]
    try:
        array = entry.decoder.array(model.inputs.section(modality))
    except UserError as error:
        raise UserError(f"modality {modality} cannot be exported: {error}") from None
    return ModelInput(modality, entry.letter, array.shape, array.dtype, array.axes, array.rate_hz)


def _noise(given: ModelInput) -> Tensor:
    """Return an array of noise: whole numbers of the whole range, or floats in [0, 1)."""
    random, dtype = generator("export", given.modality), np.dtype(given.dtype)
    if dtype.kind == "f":
        return torch.from_numpy(random.random(given.shape).astype(dtype))
    limits = np.iinfo(dtype)
    return torch.from_numpy(random.integers(limits.min, limits.max, given.shape, dtype, endpoint=True))


@torch.no_grad()
def _traced(model: KarmmaModel, header: ModelHeader, examples: dict[str, Tensor], report: Report) -> ModelProto:
    from karmma_dist.deploy.onnx_graph import assemble

    graphs, tokens = {}, {}
    for number, name in enumerate(model.modalities):
        report("export", number, len(examples) + 2)
        encoder = ClipEncoder(model, name).eval()
        # Before it is traced: what functions keep from their first call must be numbers and not symbols of the tracer.
        tokens[name] = encoder(examples[name])
        graphs[name] = _trace(encoder, (examples[name],), f"the encoder of {name}")
    report("export", len(examples), len(examples) + 2)
    flags = [torch.tensor(True) for _ in model.modalities]
    fusion = _trace(ClipFusion(model).eval(), (list(tokens.values()), flags), "the fusion block")
    shapes = {name: tuple(each.shape) for name, each in tokens.items()}
    return assemble(graphs, shapes, fusion, header.modalities, header.heads, halves=header.precision == "fp16")


def _trace(module: nn.Module, arguments: tuple[Any, ...], shown: str) -> GraphProto:
    """Return the graph of a module.

    Raises:
        UserError: PyTorch cannot export it.
    """
    from karmma_dist.deploy.onnx_graph import OPSET, simplified

    try:
        with _quietly():
            # Its optimiser takes a minute for a Swin-T; the parts of it that make a difference take a second.
            program = torch.onnx.export(
                module, arguments, dynamo=True, opset_version=OPSET, verbose=False, optimize=False
            )
            assert program is not None
            proto = simplified(program.model)
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UserError(f"{shown} cannot be exported: PyTorch's exporter says: {one_line(cause, 300)}") from None
    if domains := ", ".join(opset.domain for opset in proto.opset_import if opset.domain):
        raise UserError(f"{shown} cannot be exported: it has operators that ONNX does not define ({domains})")
    return proto.graph


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what PyTorch's exporter warns of, its own parts, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _serialised(proto: ModelProto, header: ModelHeader) -> bytes:
    """Return the file's bytes.

    Raises:
        UserError: they are more than a protobuf message may have.
    """
    for name, value in ((HEADER, header.to_json()), (DIGEST, BLANK)):
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, value
    if (num_bytes := proto.ByteSize()) > MOST_BYTES:
        raise UserError(f"the model has {num_bytes:,} bytes, and one file takes {MOST_BYTES:,}: try --precision fp16")
    return seal(proto.SerializeToString())


@torch.no_grad()
def _difference(model: KarmmaModel, runtime: Runtime, examples: dict[str, Tensor]) -> float:
    """Return the largest difference of a logit, relative to the largest logit above 1."""
    names = model.modalities
    inputs = {
        name: MODALITIES[name].tensors.make(array[None], model.inputs.section(name), None)
        for name, array in examples.items()
    }
    everything = torch.ones(1, len(names), dtype=torch.bool)
    tokens = model.encode(inputs, everything)
    largest = 0.0
    for chosen in [*((name,) for name in names), names]:
        keep = torch.tensor([[name in chosen for name in names]])
        answers = runtime.logits({name: examples[name].numpy() for name in chosen})
        for head, logits in model.fuse(tokens, everything, keep).items():
            expected = logits[0].numpy()
            scale = max(1.0, float(np.abs(expected).max()))
            largest = max(largest, float(np.abs(answers[head] - expected).max()) / scale)
    return largest
