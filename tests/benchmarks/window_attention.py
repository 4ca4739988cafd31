"""Video Swin with torchvision's blocks against ours: same weights, same tokens, both arms in turn.

    python tests/benchmarks/window_attention.py [--repeats N] [--full-repeats N]

Forward without gradients, and forward with backward, in fp32 and bf16 on the CPU; on a GPU in bf16 with 1, 4 and 8
clips. Prints medians of milliseconds (CPU time of one thread, or wall clock on a GPU), their ratio, and the most memory
that a call took on top of what was in use.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from karmma_dist.models.encoders.swin3d import SwinOptions, VideoSwin

SWIN_T = {"width": 96, "depths": [2, 2, 6, 2], "heads": [3, 6, 12, 24]}
SIZES = {"swin3d_t, 16 x 112 x 112": (16, 112), "swin3d_t, 32 x 224 x 224": (32, 224)}


class Torchvision(nn.Module):
    """Torchvision's backbone, up to the tokens that ours returns."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = SwinTransformer3d(
            [2, 4, 4], SWIN_T["width"], SWIN_T["depths"], SWIN_T["heads"], [8, 7, 7], num_classes=1  # type: ignore[arg-type]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, F, H, W) -> (N, T, D)."""
        tokens: Tensor = self.trunk.norm(self.trunk.features(self.trunk.patch_embed(x)))
        return tokens.flatten(1, 3)


def make_arms(num_frames: int, side: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Both backbones with the same random weights."""
    torch.manual_seed(0)
    ours = VideoSwin(SwinOptions.model_validate(SWIN_T), num_frames, side)
    theirs = Torchvision()
    theirs.trunk.load_state_dict(ours.state_dict(), strict=False)
    return {"torchvision": theirs.to(device, dtype).eval(), "ours": ours.to(device, dtype).eval()}


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """As evaluation and frozen encoders run."""
    with torch.no_grad():
        tokens: Tensor = model(x)
    return tokens


def forward_backward(model: nn.Module, x: Tensor) -> None:
    """As training runs, but for stochastic depth: which clips it skips would be noise here."""
    model.zero_grad()
    model(x).float().square().mean().backward()


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Most memory that the call took on top of what was in use, in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what the last call freed goes back, or this one would seem to need nothing
    Path("/proc/self/clear_refs").write_text("5")  # forget the most that was resident so far
    before = _resident_kib("VmRSS")
    run()
    return (_resident_kib("VmHWM") - before) / 2**10


def _resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def compare(size: str, device: str, dtype: torch.dtype, num_clips: int, repeats: int) -> None:
    """Print two rows: forward, and forward with backward."""
    num_frames, side = SIZES[size]
    models = make_arms(num_frames, side, device, dtype)
    x = torch.randn(num_clips, 3, num_frames, side, side, device=device, dtype=dtype)
    tokens = {name: forward(model, x).float() for name, model in models.items()}
    difference = float((tokens["ours"] - tokens["torchvision"]).abs().max())
    if difference > (1e-4 if dtype == torch.float32 else 0.2):
        raise SystemExit(f"tokens differ by {difference}: do not believe the figures below")
    clock = time.perf_counter if device == "cuda" else time.process_time
    for what, run in {"forward": forward, "forward + backward": forward_backward}.items():
        peaks = {name: peak_mib(lambda model=model, run=run: run(model, x), device) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(repeats):
            for name, model in models.items():
                started = clock()
                run(model, x)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(clock() - started)
        medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
        cells = "   ".join(f"{name} {medians[name]:8.1f} ms {peaks[name]:7.0f} MiB" for name in models)
        title = f"{size}, {num_clips} clips, {device} {str(dtype).removeprefix('torch.')}, {what}"
        print(f"{title:76} {cells}   {medians['torchvision'] / medians['ours']:4.2f} x as fast", flush=True)


def main() -> None:
    """Run all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full-repeats", type=int, default=3, help="of 32 x 224 x 224 on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size, repeats in zip(SIZES, (arguments.repeats, arguments.full_repeats), strict=True):
        for dtype in (torch.float32, torch.bfloat16):
            compare(size, "cpu", dtype, 1, repeats)
    if not torch.cuda.is_available():
        print("no GPU here: the comparison in bf16 with 1, 4 and 8 clips is skipped")
        return
    for size in SIZES:
        for num_clips in (1, 4, 8):
            compare(size, "cuda", torch.bfloat16, num_clips, 4 * arguments.repeats)


if __name__ == "__main__":
    main()
