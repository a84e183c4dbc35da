"""Coalescing: many callers who want the same thing cost one call.

Each piece is usable by itself, without a client: `SingleFlight` shares a call among those who ask at once, `Batcher`
puts what waits while a call is under way into the next, `Lease` lets one in the fleet do what all would do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veltrix_mw.coalesce.batcher import Batcher
    from veltrix_mw.coalesce.lease import Lease
    from veltrix_mw.coalesce.single_flight import SingleFlight

__all__ = ["Batcher", "Lease", "SingleFlight"]

# Each comes with its first use: the package's own modules are imported by the core, which needs no lease at a start.
_MODULES = {"Batcher": "batcher", "Lease": "lease", "SingleFlight": "single_flight"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
