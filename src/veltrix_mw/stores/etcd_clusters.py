"""Which etcd cluster the members of a URL are of: one alone is used, whatever else is named beside it.

Owns the ids that members answered with, and the verdict on another one. Asks nobody itself, and knows no transport.

Every answer names the cluster that it is of. Another id than before means either that the cluster was restored from a
backup, which gives it a new one, or that the URL names members of two clusters: each of them is whole, and a failover
from one to the other would look like a restore.
"""

from __future__ import annotations

import threading

from veltrix_mw.settings import Host, shown

__all__ = ["Clusters"]


class Clusters:
    """What one process knows of it. Thread-safe."""

    def __init__(self, hosts: tuple[Host, ...]) -> None:
        self._hosts = hosts
        # Protects what follows.
        self._lock = threading.Lock()
        self._used = ""
        self._of: dict[Host, str] = {}
        self._foreign: set[Host] = set()

    @property
    def unknown(self) -> list[Host]:
        """Members that did not say yet what they are of; none where one is named alone."""
        with self._lock:
            return [] if len(self._hosts) < 2 else [host for host in self._hosts if host not in self._of]

    def is_doubtful(self, host: Host) -> bool:
        """Whether a cluster is in use, and a member did not say last that it is of that."""
        with self._lock:
            return len(self._hosts) > 1 and bool(self._used) and self._of.get(host) != self._used

    def turned(self, host: Host, *, is_foreign: bool) -> bool:
        """Whether it was otherwise before."""
        with self._lock:
            was = host in self._foreign
            (self._foreign.add if is_foreign else self._foreign.discard)(host)
            return was != is_foreign

    def others(self, host: Host) -> list[Host]:
        return [each for each in self._hosts if each != host]

    def is_in_question(self, host: Host, cluster_id: str) -> bool:
        """Whether an answer of that id is one of another cluster than the one in use; notes it where it is not."""
        with self._lock:
            if not self._used:
                self._used = cluster_id
            if cluster_id and cluster_id != self._used and len(self._hosts) > 1:
                return True
            self._of[host] = cluster_id or self._used
            return False

    def is_foreign(self, host: Host, cluster_id: str, said: dict[Host, str]) -> bool:
        """Whether a member of that id does not belong to the others; `said` is what those say that answer now.

        It does not where one of them is still of the cluster in use. Where none is, that one was restored, if this
        member was of it before, or if most members agree: one that nobody heard of could be of any.
        """
        with self._lock:
            was = self._of.get(host, "")
            self._of |= {**said, host: cluster_id}
            if self._used in said.values():
                return True
            agree = [cluster_id, *said.values()].count(cluster_id)
            if was != self._used and 2 * agree <= len(self._hosts):
                return True
            self._used = cluster_id
            return False

    def told(self, host: Host) -> str:
        """What is wrong with a foreign member, and what to do."""
        with self._lock:
            mine = [shown(each) for each, cluster_id in self._of.items() if cluster_id == self._used]
        beside = ", ".join(mine) or "the members that were used before"
        return (
            f"etcd at {shown(host)} is of another cluster than {beside}, whose data differ: name the members of one "
            "cluster in the URL"
        )
