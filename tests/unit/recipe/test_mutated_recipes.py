"""Recipes with something wrong in them: whatever is written is a recipe or refused in a line, soon, and never half."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.packing.spec import load_spec
from karmma_dist.recipe import Recipe, load_chain, load_recipe
from karmma_dist.recipe.name import check_run_name
from karmma_dist.settings import dump, validate
from karmma_dist.studies.study import load_study
from kits.fuzzing import cases
from kits.patience import HANGS_S

ROOT = Path(__file__).resolve().parents[3]

BASES = ("demo/distill", "demo/teacher", "epic_kitchens/distill_ensemble", "something_something/radevski")

VALUES = [
    "", "~", "null", "true", "yes", "0", "-1", "3", "010", "1_000", "0x10", "1e-4", "1e30", "1e999", ".inf", ".nan",
    "12:00:00", "2024-13-45", "9" * 400, "[]", "{}", "[1, a]", "{a: {b: [c]}}", "'x'", '"\\0"', '"\\ud800"',
    '"\\U00110000"', "&a [*a]", "*b", "!!int x", "!!python/name:os.system", "a: b", "a #b", "~/x", "~nobody-here/x",
    "../x", "a//b", "-x", "é", "|\n  x", "x" * 300, "[" * 100, "${HOME}", "${NO_SUCH_VARIABLE}", "${X:-3}", "2 GB",
    "1e400 GB", "@", "video", "[video, audio]",
]  # fmt: skip
"""What is written in place of a value."""


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def mutated(draw: random.Random, tree: dict[str, Any]) -> str:
    """Return a recipe as YAML with one to three faults: in values, keys, or letters."""
    tree = copy.deepcopy(tree)
    marks: dict[str, str] = {}
    for number in range(draw.randint(1, 3)):
        *above, last = draw.choice(list(paths(tree)))
        holder: Any = tree
        for key in above:
            holder = holder[key]
        fault = draw.choice(["value", "value", "value", "remove", "rename", "add"])
        if fault == "value":
            marks[f"MARK{number}"] = draw.choice(VALUES)
            holder[last] = f"MARK{number}"
        elif fault == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            name = draw.choice(["epochs", "training", "x", "1", "vidoe", "name", "extends", "after"])
            holder[name] = holder.pop(last) if fault == "rename" else 3
    text = yaml.safe_dump(tree, sort_keys=False, width=10_000)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    if draw.random() < 0.25:
        lines = text.splitlines(keepends=True)
        place = draw.randrange(len(lines))
        others = ["<<: {}\n", "\t\n", "---\n", "? ", "training: {}\n"]
        lines.insert(place, draw.choice([lines[place], *others]))
        text = "".join(lines)
    return text


def numbers_of(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from numbers_of(entry)
    elif isinstance(value, int | float):
        yield value


def expect_sound(recipe: Recipe) -> None:
    """Expect a recipe that can be written and read again, of finite numbers and with a safe name."""
    assert all(math.isfinite(number) and abs(number) < 2**62 for number in numbers_of(recipe.model_dump(mode="json")))
    assert check_run_name(recipe.name)
    again = yaml.safe_load(dump(recipe))
    assert validate(again, Recipe, "again") == recipe


@pytest.mark.parametrize("base", BASES)
def test_a_mutated_recipe_is_a_recipe_or_refused(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(f"recipes {base}")
    tree = load_recipe(base).model_dump(mode="json", exclude_defaults=True)
    monkeypatch.chdir(tmp_path)
    path, saved = tmp_path / "mutated.yaml", tmp_path / "saved.yaml"
    num_accepted = 0
    for _ in cases(125):
        path.write_bytes(mutated(draw, tree).encode())
        began = time.process_time()
        try:
            recipe = load_recipe("mutated.yaml")
            load_chain("mutated.yaml")
        except UserError as error:
            expected, message = 2, str(error)
        else:
            num_accepted += 1
            expected, message = 0, ""
            expect_sound(recipe)
            saved.write_bytes(dump(recipe).encode())
            assert load_recipe(str(saved)) == recipe
        assert len(message) < 3_000
        assert len(message.splitlines()) <= 1
        code = main(["recipe", "show", "mutated.yaml"])
        shown = capsys.readouterr()
        assert code == expected or (code == 0 and expected == 2)  # only its chain is refused
        assert len(shown.err.splitlines()) == (code != 0)
        assert not shown.out if code else yaml.safe_load(shown.out)
        assert time.process_time() - began < HANGS_S
    assert num_accepted > 3


@pytest.mark.parametrize("name", ["shards/plain", "shards/epic_kitchens", "recipes/epic_kitchens/studies/tab3"])
def test_a_mutated_specification_or_study_is_one_or_refused(name: str, tmp_path: Path) -> None:
    draw = random.Random(f"mutated {name}")
    tree = yaml.safe_load((ROOT / f"{name}.yaml").read_text())
    path = tmp_path / "mutated.yaml"
    num_accepted = 0
    for _ in cases(100):
        path.write_bytes(mutated(draw, tree).encode())
        try:
            settings = load_spec(str(path)) if name.startswith("shards") else load_study(str(path)).study
        except UserError as error:
            problem = str(error)
        else:
            problem = ""
            num_accepted += 1
            assert all(math.isfinite(number) for number in numbers_of(yaml.safe_load(dump(settings))))
        assert len(problem) < 3_000
        assert len(problem.splitlines()) <= 1
    assert num_accepted > 3


def test_an_override_by_chance_is_taken_or_refused() -> None:
    draw = random.Random("overrides")
    keys = [".".join(map(str, place)) for place in paths(load_recipe("demo/distill").model_dump(mode="json"))]
    keys += ["", ".", "..", "a..b", "training.", ".x", "training.epochs.x", "=", " ", "a." * 3000 + "b", "k" * 100_000]
    num_accepted = 0
    for _ in cases(400):
        override = f"{draw.choice(keys)}={draw.choice(VALUES)}"
        try:
            recipe = load_recipe("demo/distill", [override])
        except UserError as error:
            problem = str(error)
        else:
            problem = ""
            num_accepted += 1
            expect_sound(recipe)
        assert len(problem) < 1_500
        assert len(problem.splitlines()) <= 1
    assert num_accepted > 20
