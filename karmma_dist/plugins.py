"""The extension of tables by entry points of other packages.

Open tables are modalities, encoders, readers, objectives, trackers and metrics.

    [project.entry-points."karmma_dist.modalities"]
    toy = "my_package.toy:TOY"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from karmma_dist.errors import UserError, nearest

Plugin = TypeVar("Plugin")


def with_plugins(own: Mapping[str, Plugin], group: str, kind: type[Plugin]) -> dict[str, Plugin]:
    """Return this package's table followed by the entry points of a group, in the order of their names.

    Args:
        own: This package's part of the table.
        group: Group of entry points.
        kind: Class of the plugins; the key is a plugin's attribute `name` if it has one, else the entry's name.

    Raises:
        UserError: a plugin cannot be imported, is not a `kind`, or has a name that is taken.
    """
    table = dict(own)
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        where = f"entry point {entry.name} = {entry.value} of {group}"
        known = f"known are {', '.join(table)}"
        try:
            plugin = entry.load()
        except Exception as error:  # code of other packages may raise any exception
            raise UserError(f"{where}: cannot be imported ({type(error).__name__}: {error}); {known}") from error
        if not isinstance(plugin, kind):
            raise UserError(f"{where}: of type {type(plugin).__name__}, not {kind.__name__}; {known}")
        name = getattr(plugin, "name", entry.name)
        if name in table:
            raise UserError(f"{where}: the name '{name}' of a {kind.__name__.lower()} is taken; {known}")
        table[name] = plugin
    return table


def find_plugin(table: Mapping[str, Plugin], name: str, field: str) -> Plugin:
    """Return the entry of a table that a recipe's field names.

    Raises:
        UserError: the table has no such entry; the message names the field, the nearest and the known names.
    """
    if name not in table:
        kind = next(iter(table.values())).__class__.__name__.removesuffix("Type").lower()
        raise UserError(
            f"{field}: unknown {kind} '{name}'{nearest(name, list(table))}; known are {', '.join(table)}"
        )
    return table[name]
