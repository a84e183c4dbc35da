"""Coalescing: many callers who want the same thing cost one call.

Each piece is usable by itself, without a client: `SingleFlight` shares a call among those who ask at once, `Batcher`
puts what waits while a call is under way into the next, `Lease` lets one in the fleet do what all would do.
"""

from veltrix_mw.coalesce.batcher import Batcher
from veltrix_mw.coalesce.lease import Lease
from veltrix_mw.coalesce.single_flight import SingleFlight

__all__ = ["Batcher", "Lease", "SingleFlight"]
