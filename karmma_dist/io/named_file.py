"""Files that are named by a path, or by a name in one of the folders recipes/, shards/ and slurm/.

    find_file("demo/distill", "recipes")      recipes/demo/distill.yaml in the working directory, or of the package

The folders come with the package: they are top-level folders of a checkout, and an installation holds them in the
package itself, below share/, wherever it was installed to.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import karmma_dist
from karmma_dist.errors import UserError, nearest, quoted

_LONGEST_SHOWN = 600
"""Characters of a name that messages show in full."""


def data_folders(name: str) -> list[Path]:
    """Return the existing folders `name` ("recipes", "shards" or "slurm"), the first to be looked in first.

    The one in the working directory comes before the one of the package.
    """
    package = Path(karmma_dist.__file__).resolve().parent
    installed, checkout = package / "share" / name, package.parent / name
    folders = [Path.cwd() / name, installed if installed.is_dir() else checkout]
    return [folder for folder in folders if folder.is_dir()]


def find_file(name: str, folder: str) -> Path:
    """Find the YAML file `name`: a path, or a name inside `folder` ("recipes" or "shards"), with or without `folder/`.

    The folder may be in the working directory or come with the package, in this order.

    Raises:
        UserError: the file does not exist; the message gives the nearest existing name.
    """
    direct = os.path.expanduser(name)
    if os.path.isfile(direct):
        return Path(direct)
    folders = data_folders(folder)
    for base in folders:
        for candidate in (base / name, base / f"{name}.yaml", base.parent / name):
            if os.path.isfile(candidate) and base.resolve() in candidate.resolve().parents:
                return candidate
    if os.path.exists(direct):
        raise UserError(f"{name}: a folder, device or pipe: name a file, or a name in {folder}/")
    known = sorted({str(p.relative_to(b).with_suffix("")) for b in folders for p in b.glob("**/*.yaml")})
    stem = re.sub(r"\.ya?ml$", "", name.removeprefix(f"{folder}/"))
    is_short = len(name) <= _LONGEST_SHOWN and name.isprintable()
    shown, held = name if is_short else quoted(name), ", ".join(known) or "nothing"
    raise UserError(f"{shown}: no such file{nearest(stem[:200], known)}; {folder}/ holds {held}")


def find_beside(name: str, path: Path, folder: str) -> str:
    """Return the path of the file `name`, with or without .yaml, in the folder of the file `path` that names it.

    Return the name itself if there is no such file, or if it is the one that `find_file` finds.
    """
    if not name or "\0" in name:
        return name
    for candidate in (path.parent / name, path.parent / f"{name}.yaml"):
        if os.path.isfile(candidate):
            try:
                is_same = find_file(name, folder).resolve() == candidate.resolve()
            except UserError:
                is_same = False
            return name if is_same else str(candidate.resolve())
    return name
