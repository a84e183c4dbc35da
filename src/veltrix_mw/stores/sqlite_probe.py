"""The probe of a SQLite file: whether it is there, and what this user may do with it.

Owns what is asked for the sake of a diagnosis. Makes no file, and ends the one write transaction that it tries without
a change.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, Final

from veltrix_mw.errors import AuthFailed, NeverWritten
from veltrix_mw.findings import Said, Step, fail, not_made, ok, warn
from veltrix_mw.protocols import Position
from veltrix_mw.settings import StoreUrl
from veltrix_mw.stores.pace import pace_said
from veltrix_mw.stores.sqlite import SqliteStore
from veltrix_mw.stores.sqlite_file import SqliteFile

__all__ = ["SqliteProbe"]

_CALLS: Final = 5


class SqliteProbe:
    """Looks at a namespace in a file. `position` is where it stands, once it was read."""

    def __init__(self, url: StoreUrl, *, timeout_s: float) -> None:
        options: dict[str, Any] = dict(url.options)
        self._path = url.name
        self._namespace = url.namespace
        self._store = SqliteStore(url.name, namespace=url.namespace, **options)
        self._file = SqliteFile(url.name, hint="")
        self._timeout_s = timeout_s
        self._is_there = False
        self.position: Position | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return (
            Step("file", self._look, needs=("url",)),
            Step("read", self._read, needs=("file",)),
            Step("write", self._write, needs=("read",)),
            Step("round trip", self._round_trip, needs=("read",)),
        )

    def close(self) -> None:
        self._store.close()
        self._file.close()

    def _look(self) -> Said:
        folder = os.path.dirname(self._path)
        if not os.path.isdir(folder):
            return fail(f"the folder {folder} is not there: make it, or correct the URL; a path with three slashes is "
                        "relative to the working directory")  # fmt: skip
        if not os.path.lexists(self._path):
            return warn(
                f"{self._path} does not exist yet: the first write makes it; or does the URL name another file?"
            )
        self._is_there = True
        return ok(f"{self._path} is there")

    def _read(self) -> Said:
        if not self._is_there:
            return not_made("there is no file yet")
        try:
            listing = self._store.list(timeout_s=self._timeout_s)
        except NeverWritten as exc:
            self._is_there = False
            return warn(str(exc))
        self.position = listing.position
        count = len(listing.entries)
        keys = "1 key" if count == 1 else f"{count} keys"
        return ok(f"{keys} in the namespace {self._namespace!r}, at revision {listing.position.revision}")

    def _write(self) -> Said:
        if not self._is_there:
            folder = os.path.dirname(self._path)
            if os.access(folder, os.W_OK | os.X_OK):
                return ok(f"the file can be made in {folder}, by its permissions (not tried)")
            return fail(f"this user may not make a file in {folder}: give it write permission on the folder")
        try:
            with self._file.session(self._timeout_s) as db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
        except AuthFailed as exc:
            return warn(f"this user may read and not write: {exc}")
        return ok("this is permitted (a transaction was begun and undone: nothing was written)")

    def _round_trip(self) -> Said:
        if self.position is None:
            return not_made("there is nothing to ask for yet")
        took_s = []
        for _ in range(_CALLS):
            begun_s = time.monotonic()
            self._store.confirm(self.position, timeout_s=self._timeout_s)
            took_s.append(time.monotonic() - begun_s)
        return pace_said(statistics.median(took_s), "a look at the newest revision")
