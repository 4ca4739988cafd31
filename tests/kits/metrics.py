"""Another package that registers metrics, installed as by pip."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from karmma_dist.evaluation.metrics import ENTRY_POINTS, metric_table

TOP3 = 'Metric("top3", "top-3", right=top_k(3), has_interval=True)'
ODD_RANKS = 'Metric("odd", "odd ranks", measure=lambda clips: float((clips.ranks_N % 2).sum()), is_percent=False)'


@contextmanager
def installed(folder: Path, **metrics: str) -> Iterator[None]:
    """Install a package into `folder` whose entry points are `metrics`: name=expression of a `Metric`."""
    package = folder / "others_metrics.py"
    lines = ["from karmma_dist.evaluation.metrics import Metric, top_k"]
    package.write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in metrics.items())]) + "\n")
    information = folder / "others_metrics-1.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: others-metrics\nVersion: 1\n")
    entries = "".join(f"{name} = others_metrics:{name}\n" for name in metrics)
    (information / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{entries}")
    sys.path.insert(0, str(folder))
    metric_table.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("others_metrics", None)
        metric_table.cache_clear()
