"""Tests that distributions hold what a checkout holds, and that installations anywhere find their folders."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from kits.patience import HANGS_S

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [".ci", "karmma_dist", "recipes", "slurm", "tests"]
FILES = {
    ".gitignore", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "THIRD_PARTY_LICENSES.md",
    "pyproject.toml", "requirements.lock", "setup.cfg", "setup.py",
}  # fmt: skip
ADDED = ("recipes/a_dataset/a_recipe.yaml", "recipes/a_dataset/studies/a_study.yaml", "shards/a_dataset.yaml")
"""Files of a dataset that nothing names; distributions hold them all the same."""
DEPENDENCIES = os.pathsep.join(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, 'build_' + sys.argv[1])(sys.argv[2])"
CALLED = 'echo "srun $*" >> "$SLURM_SUBMIT_DIR/calls"\n'


def run(command: list[str], folder: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without the variables that point this process at its packages."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "SLURM_"))}
    done = subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=HANGS_S
    )
    assert not check or done.returncode == 0, done.stderr or done.stdout
    return done


def files_in(folder: Path, *parts: str) -> set[str]:
    """Return the files below the parts of a folder, relative to the folder."""
    found = (path for part in parts for path in (folder / part).rglob("*"))
    return {str(path.relative_to(folder)) for path in found if path.is_file() and "__pycache__" not in path.parts}


@dataclass(frozen=True)
class Distributions:
    """A source distribution of a checkout, and the wheel built from it elsewhere."""

    checkout: Path
    unpacked: Path
    """Source distribution, unpacked."""
    unpacked_files: set[str]
    wheel: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Distributions of a copy of the checkout, which has one more dataset and packed shards."""
    home = tmp_path_factory.mktemp("distributions")
    checkout, out = home / "checkout", home / "out"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    (checkout / "shards/packed").mkdir(parents=True)
    for path in [*(ROOT / name for name in FILES), *ROOT.glob("shards/*.yaml"), *ROOT.glob("shards/*.md")]:
        shutil.copy(path, checkout / path.relative_to(ROOT))
    for name in (*ADDED, "shards/packed/train-000000.tar", "shards/packed/manifest.json"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("{}\n")
    run([sys.executable, "-c", BUILD, "sdist", str(out)], checkout)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(home / "unpacked", filter="data")
    (unpacked,) = (home / "unpacked").iterdir()
    unpacked_files = files_in(unpacked, ".")
    run([sys.executable, "-c", BUILD, "wheel", str(out)], unpacked)
    (wheel,) = out.glob("*.whl")
    return Distributions(checkout, unpacked, unpacked_files, wheel)


def test_the_source_distribution_holds_everything_but_packed_shards(distributions: Distributions) -> None:
    expected = files_in(distributions.checkout, *FOLDERS, "shards") | FILES
    expected = {name for name in expected if not name.startswith("shards/packed/")}
    assert set(ADDED) < expected
    assert {name for name in distributions.unpacked_files if ".egg-info/" not in name} == expected | {"PKG-INFO"}


def test_the_wheel_holds_the_package_and_its_folders(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    folders = files_in(distributions.unpacked, "recipes", "shards", "slurm")
    assert set(ADDED) < folders
    assert held == files_in(distributions.unpacked, "karmma_dist") | {f"karmma_dist/share/{name}" for name in folders}


@dataclass(frozen=True)
class Installation:
    """A place where pip put the wheel."""

    package: Path
    program: Path
    environment: dict[str, str]
    """Variables by which Python finds the place."""


@pytest.fixture(scope="module", params=["target", "user"])
def installation(
    distributions: Distributions, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Installation:
    """The wheel, installed with `--target`, or with `--user` for the interpreter that a virtual environment is of."""
    pytest.importorskip("pip")
    base = tmp_path_factory.mktemp("installed in") / "a place"
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(distributions.wheel)]
    if request.param == "target":
        run([*pip, *install, "--target", str(base)], distributions.wheel.parent)
        environment = {"PYTHONPATH": f"{base}{os.pathsep}{DEPENDENCIES}"}
    else:
        python = getattr(sys, "_base_executable", sys.executable)
        choices = ["--user", "--ignore-installed", "--break-system-packages"]
        run([*pip, "--python", python, *install, *choices], distributions.wheel.parent, PYTHONUSERBASE=str(base))
        environment = {"PYTHONUSERBASE": str(base), "PYTHONPATH": DEPENDENCIES}
    (package,) = (path.parent for path in base.rglob("karmma_dist/__init__.py"))
    return Installation(package, base / "bin/karmma-dist", environment)


def test_an_installation_finds_recipes_specifications_and_scripts(installation: Installation, tmp_path: Path) -> None:
    def karmma_dist(*words: str, status: int = 0) -> str:
        done = run([str(installation.program), *words], tmp_path, check=False, **installation.environment)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    stranger = installation.package.parent / "recipes/demo/distill.yaml"
    stranger.parent.mkdir(parents=True, exist_ok=True)
    stranger.write_text("a folder of another package beside ours\n")
    for name in ("demo/distill", "recipes/demo/distill.yaml"):
        assert karmma_dist("recipe", "show", name).startswith("name: demo/distill\n")
    assert "Usage: karmma-dist shard" in karmma_dist("shard", "--help")
    told = karmma_dist("shard", "no_such_dataset", status=2)
    assert all(f" {name}, " in told for name in ("a_dataset", "demo", "epic_kitchens", "epic_kitchens_star"))
    submitted = shlex.split(karmma_dist("launch", "demo/distill", "--slurm", "--dry-run"))
    script = submitted[submitted.index("demo/distill") - 1]
    assert Path(script) == installation.package / "share/slurm/distill.sh"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["distill.sh", "teacher.sh"])
@pytest.mark.parametrize("arguments", ["", " a/b.yaml --set c=d/e.sh f"])
def test_a_script_of_an_installation_hands_over_to_the_one_beside_it(
    installation: Installation, tmp_path: Path, name: str, arguments: str
) -> None:
    command = f"{installation.package}/share/slurm/{name}{arguments}"
    bodies = {"srun": CALLED, "squeue": "", "scontrol": f"printf 'JobId=7 JobName=x\\n   Command=%s\\n' '{command}'\n"}
    for program, body in bodies.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / program).chmod(0o755)
    copy = tmp_path / "spool/slurm_script"  # of which Slurm runs a copy
    copy.parent.mkdir()
    shutil.copy(installation.package / "share/slurm" / name, copy)
    job = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "7", "JOB_NODELIST": "n1", "JOB_NUM_NODES": "1"}
    variables = {f"SLURM_{key}": value for key, value in job.items()}
    run(["bash", str(copy)], tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin", **variables)
    checked, trained = (tmp_path / "calls").read_text().splitlines()
    recipe = f"recipes/epic_kitchens/{Path(name).stem}.yaml"
    assert checked.endswith(f"karmma-dist doctor --distributed {recipe}")
    assert trained.endswith(f"karmma-dist train {recipe}")
