"""Routes: which server of a Redis takes a namespace's calls, and who is asked where that changes.

Owns what sentinels and the nodes of a cluster are asked, and which of their answers is believed. Knows no socket and no
driver: how a question is put comes with the call. Holds no lock, which a fork could find taken: what is known is
replaced whole.

Each answer carries the epoch of the failover that it is of. One that is of an older epoch than what is known, from a
sentinel or a node that was cut off or stopped, is not believed while another one may know better: a primary that was
left is not come back to. Unless what is known has failed for long, and most of the guides that the URL names agree:
then the servers were set up anew, and epochs with them.
"""

from __future__ import annotations

import binascii
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import SystemRandom
from typing import Any, Final

from veltrix_mw.errors import StoreError, StoreNotFound, StoreUnavailable
from veltrix_mw.settings import Host, StoreUrl, shown
from veltrix_mw.stores.redis_layout import Names

__all__ = ["Ask", "Guided", "Login", "Nodes", "Question", "Route", "Sentinels", "Server", "route_of", "slot_of"]

Question = tuple[str, ...]
Ask = Callable[[Host, Sequence[Question], float], list[Any]]
"""Put questions to a host, by a deadline (monotonic); raises `StoreError`."""

Login = tuple["str | None", "str | None"]

_AGREED_S: Final = 2.0  # how long an answer is believed without asking again: a server that was replaced is left then
_ANEW_S: Final = 30.0  # a server that failed for so long would be replaced by now: Sentinel's own default
_LOOK_S: Final = 0.5  # the most that a look at what is known already may keep a call waiting
_MOST_NODES: Final = 16  # of a cluster's nodes that were learned of, so many are remembered as well
_SLOTS: Final = 16_384

_random: Final = SystemRandom()  # not the module's generator, which an application may have seeded for itself


class Server:
    """The one server that a URL names."""

    asks_for_role: Final = False
    follows: Final = False
    chosen: Final = ""

    def __init__(self, host: str, port: int, *, called: str = "") -> None:
        """`called` is what errors call it, in place of its URL."""
        self.at = (host, port)
        self._called = called

    def url(self, scheme: str, db: int) -> str:
        return self._called or f"{scheme}://{shown(self.at)}/{db}"

    def find(self, ask: Ask, deadline_s: float) -> Host:  # noqa: ARG002  # nobody is asked
        return self.at

    def doubt(self) -> None:
        """There is no other."""

    def trust(self) -> None:
        """It never was doubted."""

    def moved(self, server: Host) -> None:
        """It is not followed."""

    def begin_anew(self) -> None:
        """Nothing is drawn."""


@dataclass(frozen=True, slots=True)
class _Told:
    """An answer: the server, as of `epoch`; `others` may be asked next time."""

    server: Host
    epoch: int
    others: tuple[Host, ...] = ()


class Guided:
    """A route that is asked of others, the guides."""

    asks_for_role: bool
    """Whether a server must say that it is a primary: nothing else keeps calls from a replica."""

    follows: bool
    """Whether servers send calls on to others."""

    chosen: str
    """What the server is, behind its address in a sentence."""

    login: Login | None
    """As whom the guides are asked; None for the user of the server."""

    believed_s: float
    """When it was begun to ask, monotonic, for the last answer that was believed; since then no guide was."""

    def __init__(self, hosts: Sequence[Host], clock: Callable[[], float]) -> None:
        self._named = tuple(hosts)
        self._clock = clock
        self._known: _Told | None = None
        self.begin_anew()

    @property
    def at(self) -> Host | None:
        """The server, as far as it is known without asking."""
        return None if self._known is None else self._known.server

    def begin_anew(self) -> None:
        """In a new process: what is known stays, but who is asked first is drawn."""
        self._order = _random.sample(self._named, len(self._named))  # so that a fleet does not ask one of them alone
        self._ask_at_s = 0.0
        self._is_doubted = False
        self._failing_since_s: float | None = None
        self.believed_s = -math.inf

    def find(self, ask: Ask, deadline_s: float) -> Host:
        """The server; asks where it is not known, or nobody was asked for a while. Raises `StoreError`."""
        known, now_s = self._known, self._clock()
        if known is not None and now_s < self._ask_at_s:
            return known.server
        is_look = known is not None and not self._is_doubted
        told = self._answer(ask, min(deadline_s, now_s + _LOOK_S) if is_look else deadline_s, known)
        if told is not known:
            self.believed_s = now_s
        current = self._known
        if current is not None and current is not known and told.epoch < current.epoch:
            told = current  # another thread asked at the same time, one that knew of a later failover
        self._known = told
        self._ask_at_s = self._clock() + _AGREED_S
        self._is_doubted = False
        if known is None or told.server != known.server:
            self._failing_since_s = None
        return told.server

    def ask_again(self) -> None:
        """The next `find` asks."""
        self._ask_at_s = 0.0

    def doubt(self) -> None:
        """The server failed: ask again."""
        self.ask_again()
        self._is_doubted = True
        if self._failing_since_s is None:
            self._failing_since_s = self._clock()

    def trust(self) -> None:
        """The server answered as it should."""
        self._failing_since_s = None

    def moved(self, server: Host) -> None:
        """The server named another one."""
        known = self._known
        self._known = _Told(server, 0) if known is None else _Told(server, known.epoch, known.others)

    # ---

    def _answer(self, ask: Ask, deadline_s: float, known: _Told | None) -> _Told:
        """What is to be believed; where nobody answers, what is known already.

        Whoever was asked is last the next time: one that is behind and answers would be believed for ever.
        """
        self._order = guides = self._guides(known)
        failures = list[StoreError]()
        best: _Told | None = None
        named = list[_Told]()  # what those say whom the URL names
        for number, guide in enumerate(guides):
            now_s = self._clock()
            share_s = (deadline_s - now_s) / (len(guides) - number + 1)  # and one for the server itself
            self._put_last(guide)
            try:
                told = self._told(guide, ask(guide, self._questions, now_s + max(0.0, share_s)))
            except StoreError as exc:
                failures.append(exc)
                continue
            if best is None or told.epoch > best.epoch:
                best = told
            if guide in self._named:
                named.append(told)
            if known is None or best.epoch >= known.epoch:
                return best
        if known is not None and (best is None or failures):
            return self._set_up_anew(named) or known
        if best is not None:
            return best  # all say so: they were set up anew
        fault = next((each for each in failures if not isinstance(each, StoreUnavailable)), failures[-1])
        if not isinstance(fault, StoreUnavailable):
            raise fault
        raise StoreNotFound(f"{self._nobody}: {fault}") from fault

    def _set_up_anew(self, named: Sequence[_Told]) -> _Told | None:
        """What most of the named agree on, where the server has failed for long; None where they do not.

        Others that were learned of may be gone with the servers that they knew, and one of the named may be too.
        """
        since_s = self._failing_since_s
        if since_s is None or self._clock() - since_s < _ANEW_S or 2 * len(named) <= len(self._named):
            return None
        agree = len({told.server for told in named}) == 1
        return max(named, key=lambda told: told.epoch) if agree else None

    def _guides(self, known: _Told | None) -> list[Host]:  # noqa: ARG002  # a cluster asks others as well
        return list(self._order)

    def _put_last(self, guide: Host) -> None:
        self._order = [*(each for each in self._order if each != guide), guide]

    # What is asked, and what an answer means

    _nobody: str
    _questions: Sequence[Question]

    def called(self, guide: Host) -> str:
        """What errors call a guide."""
        raise NotImplementedError

    def _told(self, guide: Host, replies: Sequence[Any]) -> _Told:
        raise NotImplementedError


class Sentinels(Guided):
    """The primary that sentinels name.

    They are asked now and then and after each failure: a primary that was stopped, replaced and resumed goes on as one
    for seconds, and takes writes that are lost.
    """

    asks_for_role = True
    follows = False

    def __init__(
        self,
        hosts: Sequence[Host],
        name: str,
        *,
        login: Login = (None, None),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is what they call the primary; `login` is for them, not for the primary."""
        self._name = name
        self.login = login
        self.chosen = f", the primary {name!r} of the sentinels"
        self._nobody = f"none of the sentinels ({len(hosts)}) says where {name!r} is"
        self._questions = (("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name), ("SENTINEL", "MASTER", name))
        super().__init__(hosts, clock)

    def url(self, scheme: str, db: int) -> str:
        return f"{scheme}+sentinel://{','.join(map(shown, self._named))}/{self._name}/{db}"

    def called(self, guide: Host) -> str:
        return f"the sentinel {shown(guide)}"

    def _told(self, guide: Host, replies: Sequence[Any]) -> _Told:  # noqa: ARG002
        address, fields = replies
        if address is None:
            raise StoreUnavailable(f"it does not know {self._name!r} any more")  # since the moment before
        said = dict(zip(fields[::2], fields[1::2], strict=True))
        return _Told((address[0].decode(), int(address[1])), int(said.get(b"config-epoch", 0)))


class Nodes(Guided):
    """The node of a Redis Cluster that has a slot: all keys of a namespace are in one.

    A node that lost the slot names its new owner. Others are asked all the same, now and then: one that was stopped,
    replaced and resumed does not know yet.
    """

    asks_for_role = False
    follows = True
    login = None

    _questions = (("CLUSTER", "SLOTS"), ("CLUSTER", "NODES"))

    def __init__(self, hosts: Sequence[Host], slot: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.slot = slot
        self.chosen = ", the cluster's primary for the namespace"
        self._nobody = f"no node of the cluster says who has slot {slot}"
        super().__init__(hosts, clock)

    def url(self, scheme: str, db: int) -> str:  # noqa: ARG002  # there is one
        return f"{scheme}+cluster://{','.join(map(shown, self._named))}"

    def called(self, guide: Host) -> str:
        return f"the cluster's node {shown(guide)}"

    def _guides(self, known: _Told | None) -> list[Host]:
        if known is None:
            return list(self._order)
        asked = [host for host in self._order if host in self._named or host in known.others]
        learned = [host for host in known.others if host not in asked]
        # Last the owner itself: of what it lost while it was stopped it knows the least.
        return sorted([*learned, *asked], key=lambda host: host == known.server)

    def _told(self, guide: Host, replies: Sequence[Any]) -> _Told:
        slots, nodes = replies
        others: list[Host] = []
        owner: tuple[Host, bytes] | None = None
        for first, last, *places in slots:
            hosts = [(self._host(place[0], guide), int(place[1])) for place in places]
            others += [host for host in hosts if host not in others]
            if first <= self.slot <= last:
                owner = hosts[0], places[0][2]
        if owner is None:
            raise StoreUnavailable(f"{self.called(guide)} knows no owner of slot {self.slot}; try again")
        return _Told(owner[0], _epoch_of(owner[1], nodes), tuple(others[:_MOST_NODES]))

    @staticmethod
    def _host(said: bytes | None, guide: Host) -> str:
        host = (said or b"").decode()
        return guide[0] if host in {"", "?"} else host  # a node that does not know its own address


def _epoch_of(node: bytes, nodes: bytes) -> int:
    """The configuration epoch of a node, in what `CLUSTER NODES` says: the seventh word of its line."""
    for line in nodes.splitlines():
        words = line.split()
        if len(words) > 6 and words[0] == node:
            return int(words[6])
    return 0


def slot_of(key: str) -> int:
    """The slot of a cluster that a key is in: of what its first braces hold, if they hold anything."""
    raw = key.encode()
    _, opened, rest = raw.partition(b"{")
    tag, closed, _ = rest.partition(b"}")
    return binascii.crc_hqx(tag if opened and closed and tag else raw, 0) % _SLOTS


Route = Server | Sentinels | Nodes


def route_of(url: StoreUrl) -> Route:
    """How the server of a Redis's URL is found."""
    if url.scheme.endswith("+sentinel"):
        return Sentinels(url.hosts, url.name, login=(url.sentinel_user, url.sentinel_password))
    if url.scheme.endswith("+cluster"):
        return Nodes(url.hosts, slot_of(Names(url.namespace).entries))
    ((host, port),) = url.hosts
    return Server(host, port)
