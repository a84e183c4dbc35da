"""The probe of a last-known-good folder: whether a worker could save there, and what is kept.

Owns what is asked for the sake of a diagnosis. Leaves no file behind.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Final

from veltrix_mw.disk import LastKnownGood
from veltrix_mw.findings import Said, Step, fail, not_made, ok, warn
from veltrix_mw.words import ago, counted

__all__ = ["DiskProbe"]

OLD_S: Final = 30 * 86400.0
"""A copy is written whenever something changes: one that is a month old is of a quiet namespace, or of another one."""

_TRIED_BYTES: Final = 4096  # of a file without a name: whether the disk takes any


class DiskProbe:
    """Looks at a folder, as this process's user."""

    def __init__(self, folder: str | os.PathLike[str], *, namespace: str, origin_url: str) -> None:
        self._folder = Path(os.path.abspath(folder))
        self._file = LastKnownGood(self._folder, namespace=namespace, origin_url=origin_url)
        self._namespace = namespace

    @property
    def steps(self) -> tuple[Step, ...]:
        return (
            Step("folder", self._look),
            Step("writable", self._write, needs=("folder",)),
            Step("kept", self._kept, needs=("folder",)),
        )

    def _look(self, _by_s: float) -> Said:
        folder = self._folder
        if folder.is_dir():
            return ok(f"{folder} is there")
        if os.path.lexists(folder):
            return fail(f"{folder} is not a folder: name another one, or remove what is there")
        above = next((each for each in folder.parents if os.path.lexists(each)), folder)
        if not above.is_dir():
            return fail(f"{folder} cannot be made, as {above} is not a folder: name another one")
        if not os.access(above, os.W_OK | os.X_OK):
            return fail(
                f"{folder} is not there, and this user may not make it in {above}: make it, for this user alone"
            )
        try:
            tempfile.TemporaryFile(dir=above).close()  # root may do all, and yet makes nothing in /proc
        except OSError as exc:
            return fail(
                f"{folder} is not there, and nothing can be made in {above} ({exc.strerror or type(exc).__name__}): "
                "name another one"
            )
        return warn(f"{folder} is not there yet: the first save makes it; or is another one meant?")

    def _write(self, _by_s: float) -> Said:
        folder = self._folder
        if not folder.is_dir():
            return not_made("there is no folder yet")
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_TRIED_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            return fail(
                f"{folder} cannot be written to ({exc.strerror or type(exc).__name__}): make it one that this user can "
                "write to, with room on its disk, or name another one"
            )
        return ok("this user can write there (tried with a file without a name)")

    def _kept(self, _by_s: float) -> Said:
        if not self._folder.is_dir():
            return not_made("there is no folder yet")
        saved, reason = self._file.load(), self._file.error
        if saved is None:
            return warn(reason or f"nothing is kept of the namespace {self._namespace!r}: a cold start without a store "
                        "has the defaults alone, until a worker saved once")  # fmt: skip
        age_s = time.time() - saved.saved_at_s
        told = f"revision {saved.position.revision}, {counted(len(saved.entries), 'key')}, saved {ago(age_s)}"
        if reason:
            return warn(f"{told}; {reason}")
        if age_s > OLD_S:
            return warn(f"{told}: is it written to by the workers of today?")
        return ok(told)
