"""Routes: which server of a Redis takes a namespace's calls, and who is asked where that changes.

Owns what sentinels and the nodes of a cluster are asked, and which of their answers is believed. Knows no socket and no
driver: how a question is put comes with the call. What is known is replaced whole.

However many threads want to know, one asks at a time, for all of them. A guide that hangs costs one short attempt, and
is asked after the others for a while. To find the server one answer will do; before a write several are heard, as who
answers first may be cut off from the others, and not know what they do.

Each answer carries the epoch of the failover that it is of. One that is of an older epoch than what is known, from a
sentinel or a node that was cut off or stopped, is not believed while another one may know better: a primary that was
left is not come back to. Unless what is known has failed for long, and most of the guides that the URL names agree:
then the servers were set up anew, and epochs with them. Nor is one believed that names another server as of the same
epoch, or that is of another cluster, while a guide of those that were followed answers: it does not belong to them.
"""

from __future__ import annotations

import binascii
import enum
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any, Final

from veltrix_mw.errors import StoreError, StoreNotFound, StoreUnavailable
from veltrix_mw.protocols import Silent
from veltrix_mw.settings import Host, StoreUrl, shown
from veltrix_mw.stores.redis_layout import Names

__all__ = [
    "WORD_S",
    "Ask",
    "Guided",
    "Login",
    "Nodes",
    "Question",
    "Route",
    "Sentinels",
    "Server",
    "Word",
    "route_of",
    "slot_of",
]

Question = tuple[str, ...]
Ask = Callable[[Host, Sequence[Question], float], list[Any]]
"""Put questions to a host, by a deadline (monotonic); raises `StoreError`."""

Login = tuple["str | None", "str | None"]

WORD_S: Final = 1.0
"""A write asks again where the guides' last word is older: sooner than this no server is found missing and replaced."""

_AGREED_S: Final = 2.0  # how long an answer is believed without asking again: a server that was replaced is left then
_ANEW_S: Final = 30.0  # a server that failed for so long would be replaced by now: Sentinel's own default
_LOOK_S: Final = 0.5  # the most that a look at what is known already may keep a call waiting
_ATTEMPT_S: Final = 0.5  # that a guide is given at first: one answers in milliseconds, or hangs
_AVOIDED_S: Final = 30.0  # how long one that did not answer is asked after the others
_MOST_NODES: Final = 16  # of a cluster's nodes that were learned of, so many are remembered as well
_SLOTS: Final = 16_384

_random: Final = SystemRandom()  # not the module's generator, which an application may have seeded for itself


class Word(enum.Enum):
    """How much a call needs to know of where the server is."""

    KNOWN = enum.auto()
    """What was said within the last seconds, and what is known where nobody says more."""

    RECENT = enum.auto()
    """What the newest of several answers said within `WORD_S`, and what is known where nobody says more."""

    REQUIRED = enum.auto()
    """What the newest of several answers said within `WORD_S`, and nothing else."""


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

    def find(self, ask: Ask, deadline_s: float, word: Word = Word.KNOWN) -> Host:  # noqa: ARG002  # nobody is asked
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
    cluster: frozenset[bytes] = frozenset()  # the nodes that the guide knows of, where it is one itself

    def belongs_with(self, other: _Told) -> bool:
        """Whether both are of one cluster, as far as that can be told."""
        return not (self.cluster and other.cluster) or bool(self.cluster & other.cluster)


@dataclass(eq=False, slots=True)
class _Round:
    """One round of questions, for all who want to know meanwhile."""

    over: threading.Event = field(default_factory=threading.Event)
    fault: StoreError | None = None  # why nobody gave an answer
    is_cut_short: bool = False  # whether somebody who hangs was given less than an attempt


class Guided:
    """A route that is asked of others, the guides."""

    asks_for_role: bool
    """Whether a server must say that it is a primary: nothing else keeps calls from a replica."""

    follows: bool
    """Whether servers send calls on to others."""

    chosen: str
    """What the server is, behind its address in a sentence."""

    heard: int
    """How many of the guides that answer are heard before a write, of which the newest answer counts."""

    login: Login | None
    """As whom the guides are asked; None for the user of the server."""

    believed_s: float
    """When it was begun to hear several, monotonic, the last time that one of them was believed."""

    fault: str
    """Why no guide gave an answer, when they were asked last, and what to do; '' where one did."""

    apart: str
    """How the guides contradict each other, as ones do that do not belong together; '' where they do not."""

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
        # Protects `_round`; a child has its own, as a fork may find it taken.
        self._lock = threading.Lock()
        self._round: _Round | None = None  # the one that is under way
        self._order = _random.sample(self._named, len(self._named))  # so that a fleet does not ask one of them alone
        self._failed_at_s: dict[Host, float] = {}
        self._apart_since_s: dict[Host, float] = {}  # of guides that say other than what is believed
        self._ask_at_s = 0.0
        self._wanted_s = 0.0  # a round that was begun before this does not do
        self._asked_s = -math.inf  # when the last round was begun that was to hear several, and is over
        self._is_doubted = False
        self._failing_since_s: float | None = None
        self.believed_s = -math.inf
        self.fault = self.apart = ""

    def find(self, ask: Ask, deadline_s: float, word: Word = Word.KNOWN) -> Host:
        """The server; asks where what is known does not do. Raises `StoreError`, also where a word is required in vain.

        Who finds that another thread asks waits for its answer.
        """
        while True:
            with self._lock:
                now_s = self._clock()
                known = self._known
                if known is not None and self._does(word, now_s):
                    return known.server
                awaited = self._round
                led = self._round = awaited or _Round()
            if awaited is None:
                return self._lead(led, ask, deadline_s, word)
            patience_s = deadline_s - now_s
            if known is not None and not self._is_doubted and word is not Word.REQUIRED:
                patience_s = min(patience_s, _LOOK_S)
            if not awaited.over.wait(max(0.0, patience_s)):
                if known is None or word is Word.REQUIRED:
                    raise StoreNotFound(f"{self._nobody}: who asked them had no answer in time; try again")
                return known.server
            fault = None if awaited.is_cut_short else awaited.fault
            if fault is not None and (self._known is None or word is Word.REQUIRED):
                raise self._vain(fault, word)

    def ask_again(self) -> None:
        """The next `find` asks."""
        self._wanted_s = self._clock()
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
        self._known = _Told(server, 0) if known is None else _Told(server, known.epoch, known.others, known.cluster)

    # ---

    def _does(self, word: Word, now_s: float) -> bool:
        """Whether what is known does without asking."""
        if now_s >= self._ask_at_s:
            return False
        match word:
            case Word.KNOWN:
                return True
            case Word.RECENT:
                return now_s - max(self.believed_s, self._asked_s) <= WORD_S
            case Word.REQUIRED:
                return now_s - self.believed_s <= WORD_S

    def _lead(self, led: _Round, ask: Ask, deadline_s: float, word: Word) -> Host:
        """Ask, for all who wait; the server that is known from here on."""
        try:
            known, begun_s = self._known, self._clock()
            is_look = known is not None and not self._is_doubted and word is not Word.REQUIRED
            until_s = min(deadline_s, begun_s + _LOOK_S) if is_look else deadline_s
            hears_several = word is not Word.KNOWN
            told = self._answer(led, ask, until_s, known, heard=self.heard if hears_several else 1)
            if hears_several:
                self._asked_s = begun_s
                if told is not known:
                    self.believed_s = begun_s
            self._known = told
            if begun_s >= self._wanted_s:
                self._ask_at_s = self._clock() + _AGREED_S
                self._is_doubted = False
            if known is None or told.server != known.server:
                self._failing_since_s = None
            if word is Word.REQUIRED and told is known:
                led.fault = led.fault or StoreUnavailable("those that answer are behind")
                raise self._vain(led.fault, word)
            return told.server
        finally:
            with self._lock:
                self._round = None
            led.over.set()

    def _vain(self, fault: StoreError, word: Word) -> StoreError:
        """What to raise where nobody gave an answer; a new one each time, as several threads may raise it."""
        if isinstance(fault, StoreUnavailable):
            needs = ""
            if word is Word.REQUIRED and self._known is not None:
                needs = "; nothing is written without their word, as the server that is known may have been replaced"
            return StoreNotFound(f"{self._nobody}: {fault}{needs}. {self._remedy}")
        again = type(fault).__new__(type(fault), *fault.args)
        again.__dict__.update(vars(fault))
        return again

    def _answer(self, led: _Round, ask: Ask, deadline_s: float, known: _Told | None, *, heard: int) -> _Told:
        """What is to be believed; where nobody answers, what is known already.

        That is the newest of `heard` answers, of which one is to be believed; who did not answer lately is not waited
        for then. Whoever was asked is last the next time: one that is behind and answers would be believed for ever.
        Each is given a short time at first; where nothing is known those that hang are asked again, for longer.
        """
        self._order = guides = self._guides(known)
        failures = dict[Host, StoreError]()
        said = dict[Host, _Told]()
        newest: _Told | None = None
        avoided = frozenset(self._failed_at_s)
        patience_s, begun_s = _ATTEMPT_S, self._clock()
        ends_s = deadline_s - (deadline_s - begun_s) / (len(guides) + 1)  # the rest is for the server itself
        while guides:
            for number, guide in enumerate(guides):
                if newest is not None and (len(said) >= heard or guide in avoided):
                    break
                now_s = self._clock()
                share_s = max(0.0, (deadline_s - now_s) / (len(guides) - number + 1))
                self._put_last(guide)
                try:
                    told = self._told(guide, ask(guide, self._questions, now_s + min(patience_s, share_s)))
                except StoreError as exc:
                    failures[guide] = exc
                    self._failed_at_s[guide] = now_s
                    self._apart_since_s.pop(guide, None)
                    if isinstance(exc, Silent) and share_s < _ATTEMPT_S:
                        led.is_cut_short = True
                    continue
                failures.pop(guide, None)
                self._failed_at_s.pop(guide, None)
                said[guide] = told
                is_newer = newest is None or (told.epoch > newest.epoch and told.belongs_with(newest))
                if is_newer and (known is None or self._is_news(told, known)):
                    newest = told
            if newest is not None:
                self.fault = ""
                self._compare(said, newest)
                return newest
            guides = [guide for guide, fault in failures.items() if isinstance(fault, Silent)]
            patience_s *= 2
            if known is not None or self._clock() >= ends_s:
                break
        return self._made_of(led, said, failures, known)

    def _is_news(self, told: _Told, known: _Told) -> bool:
        """Whether an answer is to be believed, whatever others say."""
        if not told.belongs_with(known):
            return False
        return told.epoch > known.epoch or (told.epoch == known.epoch and told.server == known.server)

    def _made_of(
        self, led: _Round, said: dict[Host, _Told], failures: dict[Host, StoreError], known: _Told | None
    ) -> _Told:
        """What is to be believed where nobody said what is."""
        best = max(said.values(), key=lambda told: told.epoch, default=None)
        if best is not None:
            self.fault = ""
            believed = best
            if known is not None and failures:
                believed = self._set_up_anew([told for guide, told in said.items() if guide in self._named]) or known
            self._compare(said, believed)
            return believed
        fault = next((each for each in failures.values() if not isinstance(each, StoreUnavailable)), None)
        led.fault = fault = fault or list(failures.values())[-1]
        told = self._vain(fault, Word.KNOWN)
        self.fault = str(told)
        if known is not None:
            return known
        raise told from fault

    def _compare(self, said: dict[Host, _Told], believed: _Told) -> None:
        """Note who contradicts what is believed: at once where no failover explains it, or for long."""
        now_s = self._clock()
        contrary = []
        for guide, told in said.items():
            if told.server == believed.server and told.belongs_with(believed):
                self._apart_since_s.pop(guide, None)
                continue
            since_s = self._apart_since_s.setdefault(guide, now_s)
            if told.epoch == believed.epoch or not told.belongs_with(believed) or now_s - since_s >= _ANEW_S:
                contrary.append(f"{self.called(guide)} says {shown(told.server)}")
        if contrary:
            self.apart = f"{'; '.join(contrary)}; what is followed is {shown(believed.server)}"
        elif not self._apart_since_s:
            self.apart = ""

    def _set_up_anew(self, named: Sequence[_Told]) -> _Told | None:
        """What most of the named agree on, where the server has failed for long; None where they do not.

        Others that were learned of may be gone with the servers that they knew, and one of the named may be too.
        """
        since_s = self._failing_since_s
        if since_s is None or self._clock() - since_s < _ANEW_S or 2 * len(named) <= len(self._named):
            return None
        agree = len({told.server for told in named}) == 1
        return max(named, key=lambda told: told.epoch) if agree else None

    def _guides(self, known: _Told | None) -> list[Host]:
        """Who is asked, in this order: those that did not answer lately after the others."""
        since_s = self._clock() - _AVOIDED_S
        self._failed_at_s = {guide: at_s for guide, at_s in self._failed_at_s.items() if at_s > since_s}
        candidates = self._candidates(known)
        self._apart_since_s = {guide: at_s for guide, at_s in self._apart_since_s.items() if guide in candidates}
        return sorted(candidates, key=lambda guide: guide in self._failed_at_s)

    def _candidates(self, known: _Told | None) -> list[Host]:  # noqa: ARG002  # a cluster asks others as well
        return list(self._order)

    def _put_last(self, guide: Host) -> None:
        self._order = [*(each for each in self._order if each != guide), guide]

    # What is asked, and what an answer means

    _nobody: str
    _remedy: str

    one_set: str
    """What to do where they contradict each other."""

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
    heard = 16  # so all of them: there are three or five

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
        self._remedy = "Start them, or correct their addresses in the URL; who knows the primary reads on meanwhile"
        self.one_set = "Name the sentinels of one set alone, or mend the one that is cut off from the others"
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
    heard = 3  # a node that takes over tells all others at once
    login = None

    _questions = (("CLUSTER", "SLOTS"), ("CLUSTER", "NODES"))

    def __init__(self, hosts: Sequence[Host], slot: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.slot = slot
        self.chosen = ", the cluster's primary for the namespace"
        self._nobody = f"no node of the cluster says who has slot {slot}"
        self._remedy = "Start them, or name others in the URL; who knows the owner reads on meanwhile"
        self.one_set = "Name the nodes of one cluster alone, or mend the one that is cut off from the others"
        super().__init__(hosts, clock)

    def url(self, scheme: str, db: int) -> str:  # noqa: ARG002  # there is one
        return f"{scheme}+cluster://{','.join(map(shown, self._named))}"

    def called(self, guide: Host) -> str:
        return f"the cluster's node {shown(guide)}"

    def _candidates(self, known: _Told | None) -> list[Host]:
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
        ids = frozenset(line.split(maxsplit=1)[0] for line in nodes.splitlines() if line.strip())
        return _Told(owner[0], _epoch_of(owner[1], nodes), tuple(others[:_MOST_NODES]), ids)

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
