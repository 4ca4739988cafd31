"""The writer of a memory: it stores a step's answers one step later, and reports once what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable

from karmma_dist.errors import UserError
from karmma_dist.memory.records import Lookups

_logger = logging.getLogger(__name__)


class MemoryWriter:
    """Stores answers when no device has to be waited for any more. The run goes on without what cannot be stored.

    Args:
        name: Name of the memory in messages, such as "the teacher's memory".
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pending: list[Callable[[], None]] = []
        self._is_full = self._has_reported_damage = False

    def later(self, store: Callable[[], None]) -> None:
        """Call `store` at the next `flush`, unless the disk takes nothing more."""
        if not self._is_full:
            self._pending.append(store)

    def flush(self) -> None:
        """Store what is pending."""
        pending, self._pending = self._pending, []
        for store in pending:
            if self._is_full:
                return
            try:
                store()
            except (OSError, UserError) as error:
                self._is_full = True
                _logger.warning("%s is not extended any more, the run goes on: %s", self._name, error)

    def report_damage(self, lookups: Lookups) -> None:
        """Warn of damaged records, once."""
        if lookups.damaged and not self._has_reported_damage:
            self._has_reported_damage = True
            _logger.warning("%s: damaged, so this and other damaged answers are computed anew", lookups.first_damaged)
