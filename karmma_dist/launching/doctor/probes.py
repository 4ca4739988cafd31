"""The probes of `doctor`, each run in a separate process, since a broken driver or library may crash or hang it.

    python -m karmma_dist.launching.doctor.probes packages|devices|decoder

Prints one JSON object per line on stdout; output of the libraries goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from karmma_dist.errors import one_line

_MODULES = {
    "torch": "torch", "torchvision": "torchvision", "deepspeed": "deepspeed", "webdataset": "webdataset",
    "timm": "timm", "av": "av", "opencv-python-headless": "cv2", "numpy": "numpy", "pydantic": "pydantic",
}  # fmt: skip
"""Packages whose import can fail although pip installed them, by their name in pip, with their modules."""


def packages() -> Iterator[dict[str, Any]]:
    """Import each package; yield its version, the lowest version required, and the error if the import fails."""
    required = _required()
    for package, module in _MODULES.items():
        yield {"package": package, "begun": True}  # identifies the package if the import crashes
        result: dict[str, Any] = {"package": package, "required": required.get(package), "version": None, "error": None}
        try:
            result["version"] = importlib.metadata.version(package)
            importlib.import_module(module)
            if module == "torch":
                _choose_accelerator()
        except Exception as error:  # an import runs a library's own code, which may raise anything
            result["error"] = f"{type(error).__name__}: {one_line(error, 300)}"
        yield result


def devices() -> Iterator[dict[str, Any]]:
    """Yield torch's devices: each GPU, tested by adding up ones, and NCCL."""
    import torch
    import torch.distributed as dist

    result: dict[str, Any] = {"cuda": torch.version.cuda, "gpus": [], "nccl": None, "available": False}
    result["available"] = torch.cuda.is_available()
    if torch.version.cuda and dist.is_nccl_available():
        result["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for number in range(torch.cuda.device_count() if result["available"] else 0):
        properties = torch.cuda.get_device_properties(number)
        gpu = {
            "name": properties.name, "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "error": None,
        }  # fmt: skip
        try:
            total = float(torch.ones(1024, device=f"cuda:{number}").sum())
            gpu["error"] = None if total == 1024 else f"adds 1024 ones to {total}"
        except RuntimeError as error:
            gpu["error"] = one_line(error, 300)
        result["gpus"].append(gpu)
    yield result


def decoder() -> Iterator[dict[str, Any]]:
    """Encode and decode a second of video and audio in the formats of shards."""
    import io

    import av
    import numpy as np
    from av.video.reformatter import Colorspace

    from karmma_dist.modalities.audio.store import encode_flac
    from karmma_dist.modalities.encode import VideoEncoder
    from karmma_dist.modalities.video import VideoSpec

    encoder = VideoEncoder(64, 48, Fraction(10), 23, VideoSpec(), Colorspace.ITU709)
    shades = np.linspace(40, 200, 10).astype(np.uint8)
    for shade in shades:
        picture = np.full((72, 64), 128, np.uint8)
        picture[:48] = shade
        encoder.add(picture)
    with av.open(io.BytesIO(encoder.finish()), "r") as video:
        decoded = [frame.to_ndarray(format="gray").mean() for frame in video.decode(video=0)]
    close = len(decoded) == 10 and bool(np.allclose(_expanded(decoded), shades, atol=12))
    samples = (1000 * np.sin(np.arange(16_000) / 20)).astype(np.int16)
    with av.open(io.BytesIO(encode_flac(samples)), "r") as audio:
        decoded_samples = np.concatenate([frame.to_ndarray()[0] for frame in audio.decode(audio=0)])
    yield {
        "ffmpeg": av.ffmpeg_version_info, "H.264": close, "FLAC": bool(np.array_equal(decoded_samples, samples)),
        "frames": len(decoded),
    }  # fmt: skip


def _expanded(gray: list[float]) -> list[float]:
    """Convert gray values of the full range back to the limited range that was encoded."""
    return [16 + value * 219 / 255 for value in gray]


def _required() -> dict[str, str]:
    """Return the lowest required version of each package."""
    try:
        requirements = importlib.metadata.requires("karmma-dist") or []
    except importlib.metadata.PackageNotFoundError:
        return {}  # a checkout that is not installed
    matches = (re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9.]+)", line) for line in requirements)
    return {match[1].lower(): match[2] for match in matches if match}


def _choose_accelerator() -> None:
    """Tell DeepSpeed before its import if no GPU is available, as `training.engine` does."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> None:
    """Run the probe that the command line names."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    probe = {"packages": packages, "devices": devices, "decoder": decoder}[sys.argv[1]]
    for result in probe():
        print(json.dumps(result), file=output, flush=True)


if __name__ == "__main__":
    main()
