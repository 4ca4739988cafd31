"""Tables that other packages add to: modalities, encoders, readers, metrics, trackers, by entry points.

    [project.entry-points."karmma_dist.modalities"]
    toy = "my_package.toy:TOY"
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

from karmma_dist.errors import UserError

Plugin = TypeVar("Plugin")


def load_plugins(group: str, kind: type[Plugin]) -> dict[str, Plugin]:
    """Load every entry point of a group, by name.

    Raises:
        UserError: one cannot be imported, or is not a `kind`.
    """
    loaded: dict[str, Plugin] = {}
    for point in entry_points(group=group):
        package = point.dist.name if point.dist is not None else "an unknown package"
        where = f"{group}: '{point.name}' of {package} ({point.value})"
        try:
            plugin = point.load()
        except Exception as error:  # other people's code: whatever it raises is told with its name
            raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        if not isinstance(plugin, kind):
            raise UserError(f"{where} is a {type(plugin).__name__}, not a {kind.__name__} ({kind.__module__})")
        loaded[point.name] = plugin
    return loaded
