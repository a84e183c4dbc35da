"""The probe of a SQLite file: whether it is there, and what this user may do with it.

Owns what is asked for the sake of a diagnosis. Makes no file, and ends the one write transaction that it tries without
a change.
"""

from __future__ import annotations

import os
import time
from typing import Any

from veltrix_mw.errors import AuthFailed, NeverWritten
from veltrix_mw.findings import Said, Step, fail, not_made, ok, warn
from veltrix_mw.protocols import Position
from veltrix_mw.settings import StoreUrl
from veltrix_mw.stores.pace import paced
from veltrix_mw.stores.sqlite import SqliteStore
from veltrix_mw.stores.sqlite_file import SqliteFile
from veltrix_mw.words import counted, named_there

__all__ = ["SqliteProbe"]


class SqliteProbe:
    """Looks at a namespace in a file."""

    def __init__(self, url: StoreUrl) -> None:
        options: dict[str, Any] = dict(url.options)
        self._path = url.name
        self._namespace = url.namespace
        self._store = SqliteStore(url.name, namespace=url.namespace, **options)
        self._file = SqliteFile(url.name, hint="")
        self._is_there = False
        self._position: Position | None = None  # once it was read

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

    def _look(self, _by_s: float) -> Said:
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

    def _read(self, by_s: float) -> Said:
        if not self._is_there:
            return not_made("there is no file yet")
        try:
            listing = self._store.list(timeout_s=by_s - time.monotonic())
        except NeverWritten:
            return warn(f"{self._path} is an empty file: the first write fills it; or does the URL name another file?")
        self._position = listing.position
        if not listing.position.revision:
            with self._file.session(by_s - time.monotonic()) as db:
                others = [name for (name,) in db.execute("SELECT name FROM namespaces")]
            return warn(
                f"nothing was ever written to the namespace {self._namespace!r} in {self._path}: or does the URL name "
                f"another namespace?{named_there(others)}"
            )
        keys = counted(len(listing.entries), "key")
        return ok(f"{keys} in the namespace {self._namespace!r}, at revision {listing.position.revision}")

    def _write(self, by_s: float) -> Said:
        folder = os.path.dirname(self._path)
        if not self._is_there:
            if os.access(folder, os.W_OK | os.X_OK):
                return ok(f"the file can be made in {folder}, by its permissions (not tried)")
            return fail(f"this user may not make a file in {folder}: give it write permission on the folder")
        if self._position is None:
            if os.access(self._path, os.W_OK) and os.access(folder, os.W_OK | os.X_OK):
                return ok("the empty file can be filled, by its permissions and its folder's (not tried)")
            return warn(f"this user may not write to {self._path}, or make files beside it in {folder}")
        try:
            with self._file.session(by_s - time.monotonic()) as db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
        except AuthFailed as exc:
            return warn(f"this user may not write: {exc}")
        return ok("this is permitted (a transaction was begun and undone: nothing was written)")

    def _round_trip(self, by_s: float) -> Said:
        position = self._position
        if position is None:
            return not_made("there is nothing to ask for yet")
        return paced(
            lambda: self._store.confirm(position, timeout_s=by_s - time.monotonic()), "a look at the newest revision"
        )
