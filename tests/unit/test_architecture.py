"""Tests of the package's structure: allowed imports, the size of folders, and the places that name a modality."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import karmma_dist
from karmma_dist.modalities import MODALITIES

PACKAGE = Path(karmma_dist.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MOST_FILES = 12
NAMELESS = (
    "deploy", "distributed", "evaluation", "io", "models", "profiling", "runs", "shards", "streaming", "studies",
    "training",
)  # fmt: skip
"""Rooms that name no modality."""


def imported(path: Path) -> Iterator[str]:
    """Return the names, below the package, that a module imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "karmma_dist":
            for alias in node.names:
                yield f"{node.module}.{alias.name}".removeprefix("karmma_dist.")


def room(name: str) -> str:
    return name.split(".")[0]


def test_no_two_packages_import_each_other() -> None:
    needs: dict[str, set[str]] = defaultdict(set)
    for name, path in MODULES.items():
        needs[room(name)] |= {room(other) for other in imported(path)} - {room(name)}
    for start in list(needs):
        reached, waiting = set[str](), [start]
        while waiting:
            new = needs[waiting.pop()] - reached
            reached |= new
            waiting += new
        assert start not in reached, f"{start} imports itself through others"


def test_no_folder_has_too_many_files() -> None:
    counts = {folder: len(list(folder.glob("*.py"))) for folder in PACKAGE.rglob("*") if folder.is_dir()}
    crowded = {str(folder.relative_to(PACKAGE)): count for folder, count in counts.items() if count > MOST_FILES + 1}
    assert not crowded  # __init__.py is not counted


def constants(path: Path) -> Iterator[str]:
    """Return a module's string literals that are not docstrings."""
    tree = ast.parse(path.read_text())
    described = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0]) for node in ast.walk(tree) if isinstance(node, described) and node.body}
    spoken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and id(node) in docstrings}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken:
            yield node.value


@pytest.mark.parametrize("name", NAMELESS)
def test_a_room_that_serves_every_modality_names_none(name: str) -> None:
    named = {
        module: sorted(set(constants(path)) & set(MODALITIES))
        for module, path in MODULES.items()
        if room(module) == name
    }
    assert not {module: names for module, names in named.items() if names}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("karmma_dist.cli", {"torch", "numpy", "av", "cv2", "deepspeed", "matplotlib"}),
        ("karmma_dist.recipe", {"torch", "numpy", "av", "cv2"}),
        ("karmma_dist.packing.pack", {"torch", "deepspeed"}),
        ("karmma_dist.launching.local", {"torch", "deepspeed"}),
        ("karmma_dist.evaluation.command", {"deepspeed", "timm"}),
        ("karmma_dist.profiling.costs", {"deepspeed"}),
        ("karmma_dist.deploy.runtime", {"torch", "av", "cv2", "pydantic", "yaml", "click", "rich"}),
        ("karmma_dist.deploy.predict", {"torch", "timm", "deepspeed", "webdataset", "matplotlib", "safetensors"}),
    ],
)
def test_a_module_loads_no_library_that_it_does_not_need(module: str, absent: set[str]) -> None:
    code = f"import sys; import {module}; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


WRITERS = {
    "io.files": "the place for it",
    "io.locks": "lock files",
    "errors": "last words, below io",
    "evaluation.exports.epic_kitchens": "a member of a zip, into the temporary file of write_whole",
    "evaluation.exports.predictions": "into the temporary file of write_whole",
    "evaluation.report.plots": "into the temporary file of write_whole, or into memory",
    "distributed.preflight.probes": "a file that io.files creates",
    "io.cache": "private folders",
    "io.disk_errors": "the place for folders",
    "io.download": "a file that io.files creates",
    "launching.doctor.machine": "into a temporary folder",
    "launching.doctor.probes": "its own stdout",
    "memory.records": "the folder of an epoch, in that of a memory",
    "modalities.audio.store": "into memory",
    "modalities.encode": "into memory",
    "models.model_card": "into the temporary file of write_whole",
    "packing.inspect.sheet": "into the temporary file of write_whole",
    "packing.synthetic.kitchen": "into the folder of whole_folder",
    "streaming.handover": "a folder of the system's for a trial",
    "studies.results": "into the temporary file of write_whole",
    "terminal": "the process's own streams",
    "training.checkpoint.async_saver": "into the temporary file of write_whole",
    "training.profiler": "into the temporary file of write_whole",
}
"""Modules that write files or make folders themselves: why a link can lead none of them elsewhere, and a full disk is
named (`io.disk_errors`)."""

LIBRARY_WRITERS = {
    "savefig", "imwrite", "save", "savez", "savez_compressed", "save_file", "write_table", "to_parquet", "to_csv",
    "tofile", "dump_to_file", "SummaryWriter", "export_chrome_trace", "NamedTemporaryFile", "TemporaryDirectory",
    "mkstemp", "mkdtemp", "mkdir", "makedirs", "copyfile", "copy", "copy2", "copytree", "move", "write_text",
    "write_bytes", "touch",
}  # fmt: skip
"""Functions of libraries that write a file or make a folder at a path."""

PRINTERS = {
    "terminal": "the place for it",
    "cli": "help",
    "commands.diagnostics": "a recipe, as YAML that escapes what is not harmless",
    "commands.options": "JSON in ASCII",
    "distributed.preflight.preflight": "JSON in ASCII",
    "evaluation.report.terminal": "by rich_text",
    "launching.doctor.probes": "JSON in ASCII",
    "packing.inspect.tables": "JSON, line by line harmless",
}
"""Modules that print without `terminal.print_line`, and what."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call of a module with the last name of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            yield node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id, node


def writes(name: str, call: ast.Call) -> bool:
    """Return True for a call that opens a file to write into it."""
    words = [each.value for each in [*call.args, *(k.value for k in call.keywords)] if isinstance(each, ast.Constant)]
    opens = name in ("open", "fdopen") and any(
        isinstance(word, str) and set(word) & set("wax+") and set(word) <= set("rwaxbt+") for word in words
    )
    flags = {each.attr for each in ast.walk(call) if isinstance(each, ast.Attribute)}
    makes = name == "open" and "O_CREAT" in flags
    return opens or makes or (name in LIBRARY_WRITERS and not is_of_memory(name, call))


def is_of_memory(name: str, call: ast.Call) -> bool:
    """Return True for `dict.copy()`, `saver.save(engine, ...)` and other methods of that name that write no file."""
    of = call.func.value if isinstance(call.func, ast.Attribute) else None
    known = ("shutil", "np", "numpy", "torch", "image", "Image")
    return name in ("copy", "move", "save") and not (isinstance(of, ast.Name) and of.id in known)


def test_files_are_written_where_no_link_leads_elsewhere() -> None:
    found = {module for module, path in MODULES.items() if any(writes(*call) for call in calls(path))}
    assert found == set(WRITERS)


def test_locks_are_taken_in_one_place() -> None:
    assert [module for module, path in MODULES.items() if "fcntl" in path.read_text()] == ["io.locks"]


def test_yaml_is_read_in_one_place() -> None:
    assert [module for module, path in MODULES.items() if "import yaml" in path.read_text()] == ["io.yaml_file"]


def test_what_is_printed_is_harmless() -> None:
    prints = ("print", "echo", "secho")
    found = {module for module, path in MODULES.items() if any(name in prints for name, _ in calls(path))}
    assert found == set(PRINTERS)
