"""Every error the library raises, and what the caller should do about it.

Owns the error tree and nothing else; knows no store, no framework.

::

    VeltrixError
    ├── StoreError                  a store said no, or nothing
    │   ├── StoreUnavailable        retry: the store is away or too slow
    │   │   ├── NeverWritten        write: the store is not there yet, and the first write makes it
    │   │   └── StoreNotFound       retry: nobody says where the store is; whoever knew it reads on
    │   ├── Compacted               list again: the history asked for is gone
    │   ├── AuthFailed              fix it: credentials or permissions
    │   └── Overloaded              retry later: a cap protects the store
    ├── NotReady                    wait: no list and no last-known-good was had yet
    ├── RevisionTimeout             wait longer, or look at status: the revision was not applied in time
    ├── Conflict                    read again, then write: someone wrote in between (`.current`)
    ├── LeaseLost                   stop writing: another holder may have the lease
    ├── StaleRead                   the value is older than its prefix allows
    ├── KeyMissing (KeyError)       no such key
    │   └── HeldBack                the key exists, but its value was rejected and no good one is known
    ├── NotLoaded (KeyError)        fetch it first: a lazy unit read before it was fetched
    ├── NoCurrentView (LookupError) fix the code: read outside a request, without `client.pinned()`
    ├── InvalidKey (ValueError)     fix the key
    ├── InvalidValue (ValueError)   fix the value
    └── SettingsError (ValueError)  fix the settings
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veltrix_mw.snapshot import Entry

__all__ = [
    "AuthFailed",
    "Compacted",
    "Conflict",
    "HeldBack",
    "InvalidKey",
    "InvalidValue",
    "KeyMissing",
    "LeaseLost",
    "NeverWritten",
    "NoCurrentView",
    "NotLoaded",
    "NotReady",
    "Overloaded",
    "RevisionTimeout",
    "SettingsError",
    "StaleRead",
    "StoreError",
    "StoreNotFound",
    "StoreUnavailable",
    "VeltrixError",
]


class VeltrixError(Exception):
    """The root of every error raised by this library."""


class StoreError(VeltrixError):
    """A store refused or failed; the subclass says whether to retry, list again or fix something."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, or did not answer by the deadline. Retry."""


class NeverWritten(StoreUnavailable):
    """The store is not there yet: nothing was ever written. The first write makes it."""


class StoreNotFound(StoreUnavailable):
    """No sentinel, or no node of a cluster, says where the store is.

    Retry; whoever knew it before reads on, and writes nothing.
    """


class Compacted(StoreError):
    """The history asked for is gone. List again, or ask for a newer revision."""


class AuthFailed(StoreError):
    """The store refused the credentials, or they do not allow this. Retrying does not help."""


class Overloaded(StoreError):
    """A cap that protects the store was reached. Retry later."""


class NotReady(VeltrixError):
    """Nothing was listed yet and no last-known-good was found, so it is not known which keys exist."""


class RevisionTimeout(VeltrixError):
    """The revision waited for was not applied here in time. The write itself stands."""


class Conflict(VeltrixError):
    """A compare-and-set found another entry than the one expected; nothing was written.

    `key` is the first key that differed. `current` is its entry as the authority has it; for a key that
    is absent, an entry with `mod_revision` 0, which is the `expected` to try again with.
    """

    def __init__(self, message: str, *, key: str, current: Entry) -> None:
        super().__init__(message)
        self.key = key
        self.current = current


class LeaseLost(VeltrixError):
    """The lease ran out or another holder took it. Stop acting as its holder."""


class StaleRead(VeltrixError):
    """The value is older than the freshness that its prefix asks for."""


class KeyMissing(VeltrixError, KeyError):
    """No such key in the view."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError shows the repr of its argument; ours is a sentence


class HeldBack(KeyMissing):
    """The key's value was rejected, and no good value is known: it is not absent, it is wrong.

    Fix the value in the authority; the message says what was wrong with it.
    """


class NotLoaded(VeltrixError, KeyError):
    """The key lies in a lazy unit that this view does not hold. Fetch it first."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class NoCurrentView(VeltrixError, LookupError):
    """There is no request here, and no `client.pinned()` around the call."""


class InvalidKey(VeltrixError, ValueError):
    """The key is not 1 to 512 bytes of `[A-Za-z0-9._~:@-]+` segments joined by `/`."""


class InvalidValue(VeltrixError, ValueError):
    """The value is not JSON, is over a limit, or fails its schema."""


class SettingsError(VeltrixError, ValueError):
    """A setting is missing or wrong; the message says which, and how to write it."""


def public_class(error: BaseException) -> type[BaseException]:
    """The class to tell an error by: of ours the public one, as stores have finer ones among themselves.

    One that never leaves its store may say by `kind` what it leaves it as.
    """
    kind = getattr(error, "kind", None) if type(error).__module__.startswith("veltrix_mw.") else None
    told = kind if isinstance(kind, type) and issubclass(kind, BaseException) else type(error)
    return next((each for each in told.__mro__ if each.__module__ == __name__), told)
