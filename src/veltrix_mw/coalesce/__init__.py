"""Coalescing: many callers who want the same thing cost one call.

Each piece is usable by itself, without a client or a store: `SingleFlight` shares a call among those who ask at once,
`Batcher` puts what waits while a call is under way into the next.
"""

from veltrix_mw.coalesce.batcher import Batcher
from veltrix_mw.coalesce.single_flight import SingleFlight

__all__ = ["Batcher", "SingleFlight"]
