"""Typed YAML files: `extends`, `${ENVIRONMENT}` variables, `a.b=c` overrides, and errors that name file and key.

Recipes (`recipe.py`) and packing specifications (`packing/spec.py`) are both read through here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from karmma_dist.errors import UserError, nearest, one_line
from karmma_dist.resources import data_folders

Positive = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """A section of a typed YAML file: unknown keys are errors, and the docstring under a field explains it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


S = TypeVar("S", bound=Settings)


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
    return {name: _unmarked(getattr(settings, name), dumped[name], mark) for name in names}


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
            raise ValueError(f"unknown key '{where}{name}'{nearest(name, fields)}")
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


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def find_file(name: str, folder: str) -> Path:
    """Find the YAML file `name`: a path, or a name inside `folder` ("recipes" or "shards"), with or without `folder/`.

    The folder may be in the working directory or come with the package, in this order.

    Raises:
        UserError: the file does not exist; the message gives the nearest existing name.
    """
    direct = Path(name)
    if direct.is_file():
        return direct
    folders = data_folders(folder)
    for base in folders:
        for candidate in (base / name, base / f"{name}.yaml", base.parent / name):
            if candidate.is_file() and base.resolve() in candidate.resolve().parents:
                return candidate
    known = sorted({str(p.relative_to(b).with_suffix("")) for b in folders for p in b.glob("**/*.yaml")})
    stem = re.sub(r"\.ya?ml$", "", name.removeprefix(f"{folder}/"))
    raise UserError(f"{name}: no such file{nearest(stem, known)}; {folder}/ holds {', '.join(known) or 'nothing'}")


def load_settings(path: Path, cls: type[S], overrides: tuple[str, ...] | list[str] = ()) -> S:
    """Read `path` as `cls`: merge extended files, apply `a.b=c` overrides, expand variables, validate.

    Raises:
        UserError: the file or a key is invalid; the message gives file, key and nearest match.
    """
    tree = read_tree(path)
    for override in overrides:
        _override(tree, override)
    return validate(_expand(tree, path), cls, str(path))


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the plain dictionary of a YAML file merged over the one it `extends` (relative to itself)."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{seen[-1] if seen else path}: extends {path}, which does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values at the top level, found a {type(tree).__name__}")
    base = tree.pop("extends", None)
    return tree if base is None else merge(read_tree(path.parent / base, (*seen, path)), tree)


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
        raise UserError(f"{where}: " + "; ".join(_explain(e, cls) for e in error.errors())) from None


def dump(settings: Settings, *, in_ascii: bool = False) -> str:
    """Return the settings as YAML with every field; with `in_ascii`, other characters are escaped in quotes."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=not in_ascii)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected KEY=VALUE, for example --set training.epochs=3")
    parts = key.strip().split(".")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: '{part}' holds a value, not a section")
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None


def _expand(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, path) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        expanded = os.environ.get(match[1], match[2])
        if expanded is None:
            raise UserError(f"{path}: environment variable {match[1]} is not set (export {match[1]}=...)")
        return expanded

    return _VARIABLE.sub(replace, value)


def _explain(problem: Any, cls: type[Settings]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(location[-1], _fields_at(cls, location[:-1]))}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, dict) or not key else f" (given: {given!r})"
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
