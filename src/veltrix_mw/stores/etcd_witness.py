"""What a process has seen of an etcd cluster: the proof that it still is the same one, and what no answer can show.

Owns the memory of headers and of the newest position; asks nothing itself. etcd forgets what a deletion of someone
else's leaves no trace of, and a restored backup keeps its cluster's name: what was seen is the only witness.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from veltrix_mw.protocols import Position, Restored
from veltrix_mw.stores.etcd_messages import Header
from veltrix_mw.stores.etcd_space import agrees

__all__ = ["Seen", "Witness"]


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest header of a linearizable answer, and the newest position that was delivered or confirmed.

    Up to `complete_to`, a revision of the cluster, the namespace holds nothing newer than `position`. `epoch` counts
    the restores that were noticed.
    """

    cluster_id: str = ""
    raft_term: int = 0
    revision: int = 0
    position: Position | None = None
    complete_to: int = 0
    epoch: int = 0
    in_doubt: bool = False


class Witness:
    """The memory of one store. Thread-safe; a copy for a child has a lock of its own."""

    def __init__(self, seen: Seen | None = None) -> None:
        # Protects `seen`: whole values are read without it.
        self._lock = threading.Lock()
        self.seen = seen or Seen()

    def answered(self, header: Header, before: Seen) -> None:
        """Take the header of a linearizable answer; `before` is what was seen when its question was sent.

        Not what is seen now: an answer may be overtaken by a later one.
        """
        with self._lock:
            now = self.seen
            if now.epoch != before.epoch:
                return  # asked before a restore was noticed: it may be of either history
            # What was forgotten meanwhile, because a restore was told, is no longer a witness.
            is_other = bool(before.cluster_id and now.cluster_id) and (
                header.cluster_id not in {before.cluster_id, now.cluster_id}
                or header.raft_term < min(before.raft_term, now.raft_term)
                or header.revision < min(before.revision, now.revision)
            )
            if is_other:
                self.seen = Seen(
                    header.cluster_id, header.raft_term, header.revision, epoch=now.epoch + 1, in_doubt=True
                )
            else:
                self.seen = Seen(
                    header.cluster_id,
                    max(header.raft_term, now.raft_term),
                    max(header.revision, now.revision),
                    now.position,
                    now.complete_to,
                    now.epoch,
                    now.in_doubt,
                )

    def check(self, epoch: int | None = None) -> None:
        """Raise `Restored`, once, when a restore was noticed (since `epoch`)."""
        with self._lock:
            now = self.seen
            if not now.in_doubt and (epoch is None or epoch == now.epoch):
                return
            self.seen = Seen(now.cluster_id, now.raft_term, now.revision, now.position, now.complete_to, now.epoch)
        raise Restored("etcd shows an older state than before, as after a restore from a backup; list again")

    def forget(self) -> None:
        """Drop all that was seen: it turned out to be of another history, and whoever asked is told so.

        Headers too: compared with them, the next answer would tell of the same restore once more.
        """
        with self._lock:
            self.seen = Seen(epoch=self.seen.epoch)

    def remember(self, position: Position, complete_to: int, epoch: int) -> None:
        """Note that `position` is the namespace's newest up to `complete_to`."""
        with self._lock:
            now = self.seen
            if now.epoch != epoch:
                return
            known = now.position
            if known is not None and known.incarnation == position.incarnation:
                if position.revision < known.revision:
                    return
                if position.revision == known.revision:
                    complete_to = max(complete_to, now.complete_to)
            self.seen = Seen(
                now.cluster_id, now.raft_term, now.revision, position, complete_to, now.epoch, now.in_doubt
            )

    def recall(self, found: Position, at: int) -> Position:
        """The position of a listing that shows `found` at the cluster's revision `at`.

        A deletion, or what a later write covered, cannot be seen in a listing; it is what was delivered before.
        """
        seen = self.seen
        known = seen.position
        if known is None or seen.in_doubt or known.incarnation != found.incarnation:
            return found
        if found.revision < known.revision <= at:
            return known
        if found.revision == known.revision and agrees(found.fingerprint, known.fingerprint):
            return known
        return found

    def complete_to(self, position: Position) -> int:
        """Up to where nothing newer than `position` was found; 0 where that is not known."""
        seen = self.seen
        return seen.complete_to if seen.position == position and not seen.in_doubt else 0
