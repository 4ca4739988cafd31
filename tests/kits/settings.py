"""Every field of typed settings, found by iterating over them, and another value for each."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from karmma_dist.settings import Settings, is_marked

S = TypeVar("S", bound=Settings)


def fields_of(settings: Settings, mark: Any, prefix: str = "", is_free: bool = False) -> dict[str, bool]:
    """Return every field of the settings and of their sections, by dotted name: True if it or its section is marked."""
    fields: dict[str, bool] = {}
    for name, field in type(settings).model_fields.items():
        value, is_marked_here = getattr(settings, name), is_free or is_marked(field, mark)
        parts = {name: value}
        if isinstance(value, dict) and any(isinstance(entry, Settings) for entry in value.values()):
            parts = {f"{name}.{key}": entry for key, entry in value.items()}
        for path, part in parts.items():
            if isinstance(part, Settings):
                fields |= fields_of(part, mark, f"{prefix}{path}.", is_marked_here)
            else:
                fields[f"{prefix}{path}"] = is_marked_here
    return fields


def with_another(settings: S, path: str) -> S:
    """Return a copy with another value in the field of this dotted name; it need not be a valid one."""
    changed = settings.model_copy(deep=True)
    section, name = holder(changed, path)
    setattr(section, name, _other_value(type(section).model_fields[name].annotation, getattr(section, name)))
    return changed


def holder(settings: Settings, path: str) -> tuple[Settings, str]:
    """Return the section that holds the field of this dotted name, and the field's own name."""
    section: Any = settings
    *parts, name = path.split(".")
    for part in parts:
        section = section[part] if isinstance(section, dict) else getattr(section, part)
    assert isinstance(section, Settings)
    return section, name


def _other_value(annotation: Any, value: Any) -> Any:
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _other_value(arguments[0], value)
    if kind in (Union, UnionType):
        return _other_value(next(argument for argument in arguments if argument is not type(None)), value)
    if kind is Literal:
        return next(argument for argument in arguments if argument != value)
    if kind is list:
        return [*(value or []), _other_value(arguments[0], None)]
    if kind is dict:
        return {**(value or {}), "other": _other_value(arguments[1], None)}
    if kind is tuple:
        return tuple(_other_value(argument, place) for place, argument in enumerate(arguments))
    if annotation is bool:
        return not value
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        required = {name: field for name, field in annotation.model_fields.items() if field.is_required()}
        return annotation(**{name: _other_value(field.annotation, None) for name, field in required.items()})
    return f"{value or ''}other" if annotation is str else (value or 0) + 1
