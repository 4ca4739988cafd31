"""Changes of parsed JSON: any field at any depth is deleted or gets a value of another type."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DELETE = object()
_OTHER_TYPES: dict[type, tuple[Any, ...]] = {
    dict: (None, "x", 7, True, []),
    list: (None, "x", 7, True, {}),
    str: (None, 7, True, [], {}),
    int: (None, "x", 1.5, True, [], {}),
    float: (None, "x", True, [], {}),
    bool: (None, "x", 7, [], {}),
    type(None): ("x", 1.5, True, [], {}),
}


@dataclass(frozen=True)
class Harm:
    """One change of a tree."""

    path: tuple[str | int, ...]
    """Names and places that lead to the value."""
    value: Any

    @property
    def is_deletion(self) -> bool:
        """True if the value is deleted, False if it is replaced."""
        return self.value is _DELETE

    def __repr__(self) -> str:
        return f"{self.path} {'deleted' if self.is_deletion else f'= {self.value!r}'}"

    def apply(self, tree: Any) -> Any:
        """Return the changed tree; the original stays as it is."""
        if not self.path:
            return self.value
        tree = copy.deepcopy(tree)
        holder = tree
        for name in self.path[:-1]:
            holder = holder[name]
        if self.is_deletion:
            del holder[self.path[-1]]
        else:
            holder[self.path[-1]] = self.value
        return tree


def harms(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[Harm]:
    """Yield every change of one value: its deletion, and values of all other types."""
    if path:
        yield Harm(path, _DELETE)
    yield from (Harm(path, value) for value in _OTHER_TYPES[type(tree)] if value != tree)  # True is 1 to Python
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in children:
        yield from harms(value, (*path, name))
