"""Coalescing: many callers who want the same thing cost one call.

Each piece is usable by itself, without a client or a store: `SingleFlight` shares a call among those who ask at once.
"""

from veltrix_mw.coalesce.single_flight import SingleFlight

__all__ = ["SingleFlight"]
