"""Faults that a test asks for: what goes wrong, at which endpoint, at which of its calls."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

# Before the request is worked on: an answer that says no, none, or a page of somebody in between.
# After it: the answer is lost, comes late, ends half-way, or has other bytes in it.
BEFORE = ("400", "401", "403", "404", "429", "500", "503", "drop", "page")
AFTER = ("lost", "slow", "truncate", "corrupt")


@dataclass(frozen=True)
class Fault:
    """kind: one of BEFORE or AFTER. endpoint: its name in the server's table. nth: the first call
    that it happens to, from 1. times: how many calls in a row, 0 for all that follow."""

    endpoint: str
    kind: str
    nth: int = 1
    times: int = 1

    def __post_init__(self) -> None:
        assert self.kind in (*BEFORE, *AFTER), self.kind

    def hits(self, call: int) -> bool:
        return call >= self.nth and (not self.times or call < self.nth + self.times)


@dataclass
class Faults:
    planned: list[Fault] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    happened: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, endpoint: str) -> str:
        """What goes wrong with this call, `""` for nothing."""
        with self._lock:
            call = self.calls[endpoint] = self.calls.get(endpoint, 0) + 1
            for fault in self.planned:
                if fault.endpoint == endpoint and fault.hits(call):
                    self.happened.append(fault)
                    return fault.kind
        return ""

    def plan(self, *faults: Fault) -> None:
        """These, counted from now on, and no others."""
        with self._lock:
            self.planned = list(faults)
            self.calls.clear()
            self.happened.clear()
