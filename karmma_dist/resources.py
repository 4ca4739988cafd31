"""Folders of files that come with the package: recipes, packing specifications and Slurm scripts.

They are top-level folders of a checkout; an installation holds them in the package itself, below share/, wherever it
was installed to.
"""

from __future__ import annotations

from pathlib import Path

import karmma_dist


def data_folders(name: str) -> list[Path]:
    """Return the existing folders `name` ("recipes", "shards" or "slurm"), the first to be looked in first.

    The one in the working directory comes before the one of the package.
    """
    package = Path(karmma_dist.__file__).resolve().parent
    installed, checkout = package / "share" / name, package.parent / name
    folders = [Path.cwd() / name, installed if installed.is_dir() else checkout]
    return [folder for folder in folders if folder.is_dir()]
