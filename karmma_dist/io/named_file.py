"""Files that are named by a path, or by a name in one of the folders recipes/, shards/ and slurm/.

    find_file("demo/distill", "recipes")      recipes/demo/distill.yaml here, next to the package, or installed with it
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from karmma_dist.errors import UserError, nearest, quoted

_LONGEST_SHOWN = 600
"""Characters of a name that messages show in full."""


def find_file(name: str, folder: str) -> Path:
    """Find the YAML file `name`: a path, or a name inside `folder` ("recipes" or "shards").

    The folder may be in the working directory, next to the package, or in the installation's share/karmma-dist, in
    this order.

    Raises:
        UserError: the file does not exist; the message gives the nearest existing name.
    """
    direct = os.path.expanduser(name)
    if os.path.isfile(direct):
        return Path(direct)
    homes = [Path.cwd(), Path(__file__).resolve().parent.parent.parent, Path(sys.prefix) / "share" / "karmma-dist"]
    folders = [home / folder for home in homes if (home / folder).is_dir()]
    for base in folders:
        for candidate in (base / name, base / f"{name}.yaml"):
            if os.path.isfile(candidate) and base.resolve() in candidate.resolve().parents:
                return candidate
    if os.path.exists(direct):
        raise UserError(f"{name}: a folder, device or pipe: name a file, or a name in {folder}/")
    known = sorted({str(p.relative_to(b).with_suffix("")) for b in folders for p in b.glob("**/*.yaml")})
    stem = re.sub(r"\.ya?ml$", "", name.removeprefix(f"{folder}/"))
    shown, held = name if len(name) <= _LONGEST_SHOWN else quoted(name), ", ".join(known) or "nothing"
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
