"""veltrix-mw: distributed configuration, attached to each request, never a round trip away.

`ConfigClient` follows a store and serves views; `veltrix_mw.asgi` and `veltrix_mw.wsgi` hold the middleware;
`flask_veltrix`, `django_veltrix` and `starlette_veltrix` the adapters; `veltrix_mw.testing` helps tests.
"""

from veltrix_mw.client import ConfigClient
from veltrix_mw.current import Pinned, carry_view, current_view
from veltrix_mw.errors import (
    AuthFailed,
    Compacted,
    Conflict,
    HeldBack,
    InvalidKey,
    InvalidValue,
    KeyMissing,
    LeaseLost,
    NeverWritten,
    NoCurrentView,
    NotLoaded,
    NotReady,
    Overloaded,
    RevisionTimeout,
    SettingsError,
    StaleRead,
    StoreError,
    StoreNotFound,
    StoreUnavailable,
    VeltrixError,
)
from veltrix_mw.freshness import Freshness
from veltrix_mw.operations import Delete, Put
from veltrix_mw.section import Section
from veltrix_mw.snapshot import Change, Entry, Rejection, Snapshot, Version
from veltrix_mw.status import LazyStatus, Status, TierStatus
from veltrix_mw.testing import override_config
from veltrix_mw.values import MISSING
from veltrix_mw.view import View

__all__ = [
    # The client and what it gives
    "ConfigClient",
    "Freshness",
    "Snapshot",
    "View",
    "Section",
    "Pinned",
    "Entry",
    "Change",
    "Version",
    "Rejection",
    "Status",
    "TierStatus",
    "LazyStatus",
    # Writing
    "Put",
    "Delete",
    "MISSING",
    # The current view
    "current_view",
    "carry_view",
    "override_config",
    # Errors
    "VeltrixError",
    "StoreError",
    "StoreUnavailable",
    "NeverWritten",
    "StoreNotFound",
    "Compacted",
    "AuthFailed",
    "Overloaded",
    "NotReady",
    "RevisionTimeout",
    "Conflict",
    "LeaseLost",
    "StaleRead",
    "KeyMissing",
    "HeldBack",
    "NotLoaded",
    "NoCurrentView",
    "InvalidKey",
    "InvalidValue",
    "SettingsError",
]
