"""Every field of every section takes a sensible value or refuses it in one line: no infinity, nothing absurd."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import ByteSize, Field

import karmma_dist
from karmma_dist.errors import UserError
from karmma_dist.field_values import MOST
from karmma_dist.io.yaml_file import parse_yaml
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders.table import ENCODERS
from karmma_dist.models.model_card import ModelCard
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.recipe import Recipe
from karmma_dist.settings import PathText, Positive, Seconds, Settings, validate
from karmma_dist.studies.study import Study

ABSURD = {
    "inf": math.inf, "-inf": -math.inf, "nan": math.nan, "-1": -1, "-0.5": -0.5, "1e30": 1e30, "10**12": 10**12,
    "10**30": 10**30, "-10**30": -(10**30), "10**300": 10**300, "true": True, "none": None, "empty": "", "list": [],
    "section": {}, "long": "x" * 10**6, "NUL": "a\0b", "surrogate": "\ud800", ".inf": ".inf", "text of nan": "nan",
    "1e999": "1e999", "octal": "010", "underscore": "1_000", "hexadecimal": "0x10", "date": "2024-13-45", "~": "~",
    "list of inf": [math.inf], "list of lists": [[[]]], "section of inf": {"a": math.inf}, "deeper": {"a": {}},
    "large section": {"a": 10**30}, "many": ["x"] * 10, "digits": "9" * 5000, "GB": "9" * 300 + " GB",
    "NUL in list": ["a\0b"], "no home": "~nobody-has-this-name/x",
}  # fmt: skip


def every_section() -> list[type[Settings]]:
    for module in pkgutil.walk_packages(karmma_dist.__path__, "karmma_dist."):
        if module.name.split(".")[1] in ("recipe", "modalities", "packing", "studies", "models"):
            importlib.import_module(module.name)
    found: list[type[Settings]] = []
    waiting = [Settings]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.startswith("karmma_dist."):
                found.append(cls)
    return sorted(found, key=lambda cls: f"{cls.__module__}.{cls.__name__}")


SECTIONS = every_section()

REQUIRED: dict[str, dict[str, Any]] = {
    "Recipe": {
        "name": "r", "stage": "supervised", "data": {"shards": "s", "modalities": ["audio"]},
        "model": {"encoders": {"audio": {"name": "small_audio"}}},
    },
    "DataRecipe": {"shards": "s"}, "MixtureDataset": {"shards": "s", "weight": 1}, "EncoderRecipe": {"name": "e"},
    "EncoderMemory": {"path": "m"},
    "ObjectiveRecipe": {"name": "o"}, "TrackerRecipe": {"name": "t"},
    "PackingSpec": {"reader": "plain", "dataset": "d", "raw": "r", "out": "o"},
    "Column": {"name": "c"}, "Row": {"label": "l", "recipe": "r"},
    "Study": {"title": "t", "rows": [{"label": "l", "recipe": "r"}], "columns": [{"name": "c"}]},
    "ChannelSpec": {"name": "c", "unit": "u", "word": "w"},
    "TrackSpec": {"file": "f", "channels": [{"name": "c", "unit": "u", "word": "w"}]},
    "SignalSpec": {"tracks": [{"file": "f", "channels": [{"name": "c", "unit": "u", "word": "w"}]}]},
    "ModelCard": {"modalities": [], "heads": {}, "model": {}, "inputs": {}},
    "FramesOptions": {"model": "m"},
    "EpicPaths": {"splits": {"train": "t.csv"}, "heads": {"verb": "v"}},
}  # fmt: skip


def test_all_sections_are_found() -> None:
    assert {Recipe, PackingSpec, Study, ModelCard} <= set(SECTIONS)
    assert {modality.settings for modality in MODALITIES.values()} <= set(SECTIONS)
    assert {encoder.options for encoder in ENCODERS.values()} <= set(SECTIONS)
    needing = {cls.__name__ for cls in SECTIONS if any(field.is_required() for field in cls.model_fields.values())}
    assert needing | {"DataRecipe"} == set(REQUIRED)  # which needs one of two fields


def values_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Settings):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from values_in(entry)
    else:
        yield value


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_field_takes_a_sensible_value_or_refuses_it(cls: type[Settings]) -> None:
    tree = REQUIRED.get(cls.__name__, {})
    if cls.__name__ != "DistillRecipe":  # which needs one of two fields
        validate(tree, cls, "x.yaml")
    problems: list[str] = []
    for name in cls.model_fields:
        for given in ABSURD.values():
            try:
                section = validate({**tree, name: given}, cls, "x.yaml")
            except UserError as error:
                problems.append(str(error))
                continue
            for value in values_in(getattr(section, name)):
                if isinstance(value, str):
                    assert len(value) <= 10_000
                    assert "\0" not in value
                elif value is not None:
                    most = 10**18 if isinstance(value, ByteSize) else 2**62 if name == "seed" else 10**12
                    assert abs(value) <= most  # neither infinite nor NaN
            value = getattr(section, name)
            assert not (given is True and isinstance(value, int | float) and not isinstance(value, bool))
    for problem in problems:
        assert problem.startswith("x.yaml: ")
        assert len(problem) < 1000
        assert len(problem.splitlines()) == 1


class Sample(Settings):
    """A section with a field of each kind."""

    text: str = "x"
    """Text."""
    maybe: str | None = None
    """Text or nothing."""
    choice: Literal["none", "all"] = "none"
    """A word."""
    three: Literal[1, 3] = 1
    """A number out of two."""
    whole: Positive = 1
    """A count."""
    bare: int = 0
    """A number without any bound of its own."""
    large: Annotated[int, Field(le=10**15)] = 0
    """A number with a bound of its own."""
    real: float = 0.0
    """A number."""
    flag: bool = False
    """True or false."""
    size: ByteSize = ByteSize(0)
    """Bytes."""
    wait: Seconds = 1.0
    """Seconds."""
    path: PathText = "."
    """A path."""
    paths: list[PathText] = []
    """Paths."""
    words: dict[str, list[str]] = {}
    """Texts."""
    pair: tuple[str, int] | None = None
    """A text and a number."""
    anything: dict[str, Any] = {}
    """Values of any kind."""


def sample(text: str) -> Sample:
    return validate(parse_yaml(text, "s.yaml"), Sample, "s.yaml")


@pytest.mark.parametrize(
    "text", ["12:00:00", "0123", "7", "1e-4", "true", "NO", "2024-13-45", "1_0", ".inf", "0x1", "-0"]
)
def test_a_text_field_gets_what_is_written(text: str) -> None:
    read = sample(f"text: {text}\nmaybe: {text}\nwords: {{a: [{text}]}}\npair: [{text}, 3]\npaths: [{text}]")
    assert (read.text, read.maybe, read.words, read.pair, read.paths) == (text, text, {"a": [text]}, (text, 3), [text])


def test_nothing_is_no_text() -> None:
    assert sample("maybe:\nanything: {a: , b: ~, c: '~'}").anything == {"a": None, "b": None, "c": "~"}
    for nothing in ("", "~", "null"):
        with pytest.raises(UserError, match=r"'text': .*\(given: None\)"):
            sample(f"text: {nothing}")


@pytest.mark.parametrize(
    ("text", "number"),
    [("3", 3), ("'3'", 3), ("3.0", 3), ("1e3", 1000), ("'1e3'", 1000), ("+3", 3), ('" 3 "', 3)],
)
def test_a_number_is_decimal_be_it_in_quotes_or_not(text: str, number: int) -> None:
    read = sample(f"whole: {text}\nreal: {text}\nbare: {text}\nlarge: {text}\nwait: {text}\nsize: {text}")
    assert [read.whole, read.real, read.bare, read.large, read.wait, read.size] == [number] * 6
    assert [type(read.whole), type(read.real)] == [int, float]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("010", "write 10, or 8 if it is octal"), ("-010", "write -10, or -8"), ("089", "write 89$"), ("00", "write 0"),
        ("1_000", "write 1000"), ("0x10", "write 16"), ("0o10", "write 8"), ("0b11", "write 3"), (".inf", "finite"),
        ("-.INF", "finite"), (".nan", "finite"), ("inf", "finite"), ("nan", "finite"), ("Infinity", "finite"),
        ("1e999", "finite"), ("true", "not true or false"), ("FALSE", "not true or false"), ("yes", "a number$"),
        ("12:00:00", "expected a number$"), ("2024-01-01", "expected a number$"), ("''", "a number$"),
        ("fast", "expected a number$"), ("'true'", "expected a number$"), ("\u0663", "a number$"),
    ],
)  # fmt: skip
def test_what_some_read_as_another_number_is_refused_with_what_to_write(text: str, advice: str) -> None:
    for field in ("whole", "bare", "real", "large", "wait", "size", "three"):
        with pytest.raises(UserError, match=rf"s\.yaml: '{field}': ") as caught:
            sample(f"{field}: {text}")
        shown = str(caught.value).rpartition(" (given")[0]
        assert advice.rstrip("$") in shown
        assert not advice.endswith("$") or shown.endswith(advice[:-1])


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("whole", 10**6, 10**6 + 1), ("bare", MOST, MOST + 1), ("bare", -MOST, -MOST - 1), ("real", 1e9, 1.1e9),
        ("large", 10**15, 10**15 + 1), ("size", 10**18, 10**19), ("wait", 10**6, 10**6 + 1), ("three", 3, 2),
    ],
)  # fmt: skip
def test_a_field_without_a_bound_has_one(field: str, good: float, bad: float) -> None:
    assert getattr(sample(f"{field}: {good}"), field) == good
    with pytest.raises(UserError, match=f"'{field}'"):
        sample(f"{field}: {bad}")


def test_a_truth_value_is_written_in_any_common_way() -> None:
    for word in ("true", "yes", "on", "True", "1", "'true'"):
        assert sample(f"flag: {word}").flag is True
    for word in ("false", "no", "off", "FALSE", "0"):
        assert sample(f"flag: {word}").flag is False
    with pytest.raises(UserError, match="'flag'"):
        sample("flag: 2")


def test_home_is_expanded_at_the_beginning_of_a_path_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    read = sample("path: ~/x\npaths: [a/~/b, ~/y, 's3://b/~/c', ./~/z, x~]\ntext: ~/x")
    assert read.path == "/home/me/x"
    assert read.paths == ["a/~/b", "/home/me/y", "s3://b/~/c", "./~/z", "x~"]
    assert read.text == "~/x"


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 256, "a/" * 1501, "~nobody-has-this-name/x", "\ud800"])
def test_what_no_file_can_be_called_is_no_path(path: str) -> None:
    with pytest.raises(UserError, match=r"'path': .*") as caught:
        validate({"path": path}, Sample, "s.yaml")
    assert len(str(caught.value)) < 250


def paths_of(cls: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        if "expand_home" in f"{field.annotation} {field.metadata}":
            yield f"{prefix}{name}"
        for section in SECTIONS:
            if field.annotation is section:
                yield from paths_of(section, f"{prefix}{name}.")


def test_every_field_that_names_a_file_or_folder_is_a_path() -> None:
    assert set(paths_of(Recipe)) == {
        "runs_dir", "after", "data.shards", "data.cache_dir", "evaluation.annotations", "slurm.script",
    }  # fmt: skip
    assert set(paths_of(PackingSpec)) == {"raw", "out"}


def test_errors_quote_a_little_of_what_is_long_and_no_password() -> None:
    for tree in (
        {"whole": "y" * 9_000}, {"text": ["z" * 100_000]}, {"k" * 100_000: 1}, {"path": "p" * 5_000},
        {"words": {"a" * 5_000: 3}}, {"choice": "c" * 9_000}, {f"k{i}": 1 for i in range(5_000)},
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            validate(tree, Sample, str(Path("s.yaml")))
        assert len(str(caught.value)) < 1_000
    url = "https://anna:hush@host/" + "x" * 300
    with pytest.raises(UserError) as caught:
        validate({"whole": url}, Sample, "s.yaml")
    assert "hush" not in str(caught.value)
