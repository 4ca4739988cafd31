"""Typed YAML files: `extends`, `${ENVIRONMENT}` variables, `a.b=c` overrides, and errors that name file and key.

Recipes, packing specifications, studies and model cards are all read through here; `io/yaml_file.py` parses the YAML,
and `field_values.py` says what a field takes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from karmma_dist.errors import UserError, nearest, quoted
from karmma_dist.field_values import PathText, Positive, Seconds, check_sane, entries, expand_home, fitted
from karmma_dist.io.yaml_file import MOST_BYTES, MOST_DEPTH, Plain, parse_value, plain_values, read_yaml, to_yaml

__all__ = [
    "PathText", "Positive", "Seconds", "Settings", "check_other_sections", "dump", "flat",
    "is_marked", "load_settings", "mark", "marked", "merge", "read_tree", "unmarked", "validate",
]  # fmt: skip

_MOST_EXTENDED = 32
"""Files that extend each other."""
_MOST_PROBLEMS = 10
"""Problems of a file that its message names."""
_LONGEST_QUOTED = 60
"""Characters of a value in a message."""
_LONGEST_PROBLEM = 600
"""Characters of a problem in a message."""


class Settings(BaseModel):
    """A section of a typed YAML file: unknown keys are errors, and the docstring under a field explains it.

    Every field takes what `field_values.py` describes: text as it is written, and finite numbers of a sane size.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _fit(cls, value: Any, info: ValidationInfo) -> Any:
        return fitted(value, cls.model_fields[str(info.field_name)].annotation)

    @field_validator("*", mode="after")
    @classmethod
    def _is_sane(cls, value: Any, info: ValidationInfo) -> Any:
        check_sane(value, cls.model_fields[str(info.field_name)])
        return value


S = TypeVar("S", bound=Settings)

Prepare = Callable[[dict[str, Any], Path], None]


def mark(keyword: str) -> Any:
    """Return a mark for fields, set by `Annotated[type, mark]`; the JSON schema shows it as `keyword: true`."""
    return Field(json_schema_extra={keyword: True})


def is_marked(field: FieldInfo, mark: Any) -> bool:
    """Return True if the field of a section has the mark."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and mark.json_schema_extra.items() <= extra.items()


def unmarked(settings: Settings, mark: Any) -> dict[str, Any]:
    """Return the settings as JSON values, without the fields and sections that have the mark."""
    dumped = settings.model_dump(mode="json")
    kept = (name for name, field in type(settings).model_fields.items() if not is_marked(field, mark))
    names = [*kept, *(settings.__pydantic_extra__ or {})]
    return {name: _unmarked(getattr(settings, name), dumped[name], mark) for name in names if name in dumped}


def _unmarked(value: Any, dumped: Any, mark: Any) -> Any:
    if isinstance(value, Settings):
        return unmarked(value, mark)
    if isinstance(value, dict):
        return {key: _unmarked(entry, dumped[key], mark) for key, entry in value.items()}
    return dumped


def marked(cls: type[Settings], mark: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of the fields of a class and its sections that bear the mark."""
    names = []
    for name, field in cls.model_fields.items():
        if is_marked(field, mark):
            names.append(f"{prefix}{name}")
        elif (section := _section_type(field.annotation)) is not None:
            names += marked(section, mark, f"{prefix}{name}.")
    return names


def check_other_sections(settings: Settings, known: Mapping[str, type[Settings]], where: str = "") -> None:
    """Replace sections that are not fields of the settings' class by instances of their known classes, in place.

    Raises:
        ValueError: a section is unknown.
        UserError: a section does not fit its class.
    """
    extra = settings.__pydantic_extra__ or {}
    for name in extra:
        if name not in known:
            fields = [*type(settings).model_fields, *known]
            raise ValueError(f"unknown key {quoted(where + name)}{nearest(name[:_LONGEST_QUOTED], fields)}")
        if not isinstance(extra[name], Settings):
            extra[name] = validate(extra[name], known[name], f"{where}{name}")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted name ("training.epochs"); an empty dictionary is a value."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


_VARIABLE = re.compile(r"\$\{(\w{1,200})(?::-([^}]{0,1000}+))?\}")
"""A variable; the limits keep the search in a long text from taking its length squared."""


def load_settings(
    path: Path, cls: type[S], overrides: tuple[str, ...] | list[str] = (), prepare: Prepare | None = None
) -> S:
    """Read `path` as `cls`: merge extended files, apply `a.b=c` overrides, expand variables, validate.

    Raises:
        UserError: the file or a key is invalid; the message gives file, key and nearest match.
    """
    tree = read_tree(path, prepare=prepare)
    for override in overrides:
        _override(tree, override)
    return validate(_expand(tree, path), cls, str(path))


def read_tree(path: Path, *, limit: int = MOST_BYTES, prepare: Prepare | None = None) -> dict[str, Any]:
    """Return the dictionary of a YAML file merged over the one it `extends` (relative to itself).

    Args:
        path: Path of the file.
        limit: Largest number of bytes of a file.
        prepare: Function that is called with the content and path of each file before it is merged, and may change it.

    Raises:
        UserError: a file cannot be read, or files extend each other.
    """
    return _read_tree(path.resolve(), limit, prepare, ())


def _read_tree(path: Path, limit: int, prepare: Prepare | None, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    if len(seen) > _MOST_EXTENDED:
        raise UserError(f"{path}: {_MOST_EXTENDED} files extend each other before this one: extend fewer")
    try:
        tree = read_yaml(path, limit)
    except FileNotFoundError:
        problem = f"{seen[-1]}: extends {path}, which does not exist" if seen else f"{path}: no such file"
        raise UserError(problem) from None
    tree = {} if isinstance(tree, Plain) and tree.value is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values at the top level, found {quoted(plain_values(tree))}")
    if prepare is not None:
        prepare(tree, path)
    if "extends" not in tree:
        return tree
    base = _extended(tree.pop("extends"), path)
    return merge(_read_tree(base, limit, prepare, (*seen, path)), tree)


def _extended(base: Any, path: Path) -> Path:
    """Return the path of the file that another extends."""
    name = fitted(base, str)
    if not isinstance(name, str):
        raise UserError(f"{path}: extends is {quoted(plain_values(base))}: give the path of one file, or remove it")
    try:
        return Path(os.path.realpath(path.parent / expand_home(name)))
    except ValueError as error:
        raise UserError(f"{path}: extends is {quoted(name)}: {error}") from None


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Merge `top` over `base`: dictionaries key by key, everything else replaced."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def validate(tree: dict[str, Any], cls: type[S], where: str) -> S:
    """Build `cls` from `tree`.

    Raises:
        UserError: a key or value is invalid; the message lists all problems in one line.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(problem, cls) for problem in error.errors(include_url=False)[:_MOST_PROBLEMS]]
        more = error.error_count() - len(problems)
        problems += [f"and {more} more"] if more else []
        raise UserError(f"{where}: {'; '.join(problems)}") from None


def dump(settings: Settings, *, in_ascii: bool = False) -> str:
    """Return the settings as YAML with every field; with `in_ascii`, other characters are escaped in quotes."""
    return to_yaml(settings.model_dump(mode="json"), in_ascii=in_ascii)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    where = f"--set {override if len(override) <= 80 and override.isprintable() else quoted(override)}"
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MOST_DEPTH:
        raise UserError(f"{where}: expected KEY=VALUE, for example --set training.epochs=3")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if isinstance(child, Plain):
            child = node[part] = {} if child.value is None else child.value
        if not isinstance(child, dict):
            raise UserError(f"{where}: {quoted(part)} holds a value, not a section")
        node = child
    node[parts[-1]] = parse_value(value, where)


def _expand(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path) for item in value]
    if isinstance(value, Plain):
        return Plain(_expand(value.text, path), _expand(value.value, path))
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        expanded = os.environ.get(match[1], match[2])
        if expanded is None:
            raise UserError(f"{path}: environment variable {match[1][:60]} is not set (export {match[1][:60]}=...)")
        return expanded

    return _VARIABLE.sub(replace, value)


def _explain(problem: Any, cls: type[Settings]) -> str:
    location = [quoted(str(part))[1:-1] for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(location[-1], _fields_at(cls, location[:-1]))}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    given = plain_values(problem.get("input"))
    message = str(problem["msg"]).removeprefix("Value error, ")
    for text in entries(given):
        if isinstance(text, str) and len(text) > _LONGEST_QUOTED:
            message = message.replace(text, quoted(text, _LONGEST_QUOTED)[1:-1])
    message = message if len(message) <= _LONGEST_PROBLEM else f"{message[: _LONGEST_PROBLEM - 3]}..."
    shown = "" if isinstance(given, dict) or not key else f" (given: {quoted(given)})"
    return f"'{key}': {message}{shown}" if key else message


def _fields_at(cls: type[Settings], location: list[str]) -> list[str]:
    """Return the names of the fields of the section at `location`, for the nearest match."""
    current: Any = cls
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue  # a key of a dictionary of sections: its value type is already `current`
        current = _section_type(field.annotation)
    return list(getattr(current, "model_fields", {}))


def _section_type(annotation: Any) -> Any:
    """Return the Settings class inside `X | None`, `dict[str, X]` or `X` itself, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        section = _section_type(argument)
        if section is not None:
            return section
    return None
