"""Opening: from a URL to the store that it names.

Owns which scheme is which store, and imports a backend only when its scheme is asked for.
"""

from __future__ import annotations

from typing import Any

from veltrix_mw.protocols import Store
from veltrix_mw.settings import StoreUrl

__all__ = ["open_store"]


def open_store(url: StoreUrl) -> Store:
    """The store of `url`; nothing is connected or read before its first call."""
    options: dict[str, Any] = dict(url.options)
    match url.scheme:
        case "memory":
            from veltrix_mw.stores.memory import MemoryStore

            return MemoryStore(name=url.name, namespace=url.namespace, **options)
        case "sqlite":
            from veltrix_mw.stores.sqlite import SqliteStore

            return SqliteStore(url.name, namespace=url.namespace, **options)
        case _:
            raise AssertionError(f"parse_url let {url.scheme} pass")
