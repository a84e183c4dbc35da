"""The formation: whether the sentinels or nodes that a URL names belong together, and whether a failover is possible.

Owns the verdicts on what they said. Pure: knows no connection, and asks nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from veltrix_mw.findings import Said, fail, ok, warn
from veltrix_mw.settings import Host, shown
from veltrix_mw.words import counted

__all__ = ["NodesSeen", "SentinelsSeen", "View", "view_of"]

SLOTS: Final = 16_384
_ELECTORS: Final = 3  # the fewest of which a majority is left when one ends


class SentinelsSeen:
    """What sentinels say of one primary: of each that answered, the fields of `SENTINEL MASTER`."""

    def __init__(self, name: str, answers: Mapping[Host, Mapping[str, str]], *, named: int) -> None:
        """`named` is how many the URL names."""
        self._name = name
        self._answers = answers
        self._named = named

    def fault(self) -> Said | None:
        """Why they are not one set; None where they are."""
        told = {host: f"{each.get('ip', '?')}:{each.get('port', '?')}" for host, each in self._answers.items()}
        ids = {each["runid"] for each in self._answers.values() if each.get("runid")}
        if len(set(told.values())) < 2 or len(ids) == 1:
            return None
        each = ", ".join(f"{shown(host)} says {at}" for host, at in told.items())
        return fail(
            f"the sentinels do not agree where {self._name!r} is ({each}): name the sentinels of one set alone; or a "
            "failover is under way: look again in a moment"
        )

    def failover(self, replicas: int, wanted: int) -> Said:
        """Whether another server could take over; `replicas` is how many are connected to the primary, `wanted` how
        many it needs to take writes.
        """
        most = max(self._answers.values(), key=lambda each: _number(each, "num-other-sentinels"))
        total, quorum = _number(most, "num-other-sentinels") + 1, _number(most, "quorum")
        usable, majority = total - (self._named - len(self._answers)), total // 2 + 1
        remedies = []
        if not replicas:
            known = _number(most, "num-slaves")
            lost = f" (the sentinels know of {known}: is masterauth right there?)" if known else ""
            remedies.append(f"no replica is connected to the primary{lost}: start one (replicaof)")
        remedies += _too_few(replicas, wanted)
        if total < _ELECTORS:
            remedies.append(
                f"{counted(total, 'sentinel')} alone, so that none may be lost: run three, on machines of their own"
            )
        if quorum > total:
            remedies.append(
                f"the quorum is {quorum} of {counted(total, 'sentinel')}: redis-cli -p 26379 SENTINEL SET {self._name} "
                f"quorum {majority}"
            )
        elif usable < max(quorum, majority):
            remedies.append(
                f"{usable} of {counted(total, 'sentinel')} at most can be reached, and a failover takes "
                f"{max(quorum, majority)}: start the others"
            )
        blind = [shown(host) for host, each in self._answers.items() if "_down" in each.get("flags", "")]
        if blind:
            remedies.append(
                f"{', '.join(blind)} cannot reach the primary, which answers here: give the sentinels its password "
                "(sentinel auth-pass, auth-user), or look at their network"
            )
        if remedies:
            return warn(f"nothing takes over when the primary ends, or not as it should: {'; '.join(remedies)}")
        return ok(f"{counted(replicas, 'replica')} can take over, by {quorum} of {total} sentinels")


def _too_few(replicas: int, wanted: int) -> list[str]:
    """What there is to do for a primary that takes over and has one replica less than the one before."""
    if not replicas or replicas > wanted:
        return []
    have = f"{counted(replicas, 'replica')} and min-replicas-to-write {wanted}"
    return [f"{have}: who takes over has one less, and takes no writes until the one that ended is back: add a replica"]


def _number(fields: Mapping[str, str], name: str) -> int:
    text = fields.get(name, "")
    return int(text) if text.isdigit() else 0


@dataclass(frozen=True, slots=True)
class _Node:
    id: str
    host: Host
    flags: frozenset[str]
    primary: str
    epoch: int
    is_linked: bool
    slots: tuple[tuple[int, int], ...]
    moves: Mapping[int, tuple[bool, str]] = field(default_factory=dict)  # slot: whether it leaves, and the other's id

    @property
    def is_up(self) -> bool:
        return self.is_linked and not self.flags & {"fail", "handshake", "noaddr"}

    def has(self, slot: int) -> bool:
        return any(first <= slot <= last for first, last in self.slots)

    @property
    def slot_count(self) -> int:
        return sum(last - first + 1 for first, last in self.slots)


@dataclass(frozen=True, slots=True)
class View:
    """What one node says of all."""

    myself: _Node
    nodes: tuple[_Node, ...]

    @property
    def ids(self) -> set[str]:
        return {node.id for node in self.nodes}

    @property
    def slot_count(self) -> int:
        return sum(node.slot_count for node in self.nodes)


def view_of(reply: bytes, asked: Host) -> View | None:
    """What `CLUSTER NODES` says, by a node at `asked`; None for what cannot be read."""
    nodes = [node for line in reply.decode("utf-8", "replace").splitlines() if (node := _node_of(line, asked))]
    myself = next((node for node in nodes if "myself" in node.flags), None)
    return None if myself is None else View(myself, tuple(nodes))


def _node_of(line: str, asked: Host) -> _Node | None:
    words = line.split()
    if len(words) < 8:
        return None
    flags = frozenset(words[2].split(","))
    address, _, port = words[1].partition("@")[0].rpartition(":")
    host = asked if "myself" in flags else (address or asked[0], int(port) if port.isdigit() else 0)
    slots: list[tuple[int, int]] = []
    moves: dict[int, tuple[bool, str]] = {}
    for word in words[8:]:
        if word.startswith("["):
            slot, arrow, other = word.strip("[]").partition("->-")
            if not arrow:
                slot, _, other = word.strip("[]").partition("-<-")
            moves[int(slot)] = bool(arrow), other
        else:
            first, _, last = word.partition("-")
            slots.append((int(first), int(last or first)))
    return _Node(words[0], host, flags, words[3], int(words[6]), words[7] == "connected", tuple(slots), moves)


class NodesSeen:
    """What the nodes of a cluster say, and what that means for the namespace in `slot`."""

    def __init__(self, slot: int, views: Mapping[Host, View], *, named: Sequence[Host]) -> None:
        """`views` are of those that answered, `named` those of the URL."""
        self._slot = slot
        self._views = views
        self._named = named

    @property
    def primaries(self) -> Sequence[Host]:
        """All that have slots, where they say they are."""
        best = self._best
        return [] if best is None else [node.host for node in best.nodes if node.slots]

    @property
    def lost(self) -> int:
        """How many slots nobody has."""
        return 0 if self._best is None else SLOTS - self._best.slot_count

    @property
    def fix(self) -> str:
        best = self._best
        return "" if best is None else f"redis-cli --cluster fix {shown(best.myself.host)}"

    def fault(self) -> Said | None:
        """Why the namespace is served by nobody, or not whole; None where it is."""
        best = self._best
        if best is None:
            return None
        alone = [host for host, view in self._views.items() if len(view.nodes) == 1 and not view.slot_count]
        if not best.slot_count:
            nodes = " ".join(map(shown, self._named))
            return fail(
                "these nodes are no cluster yet, as none of them has a slot: redis-cli --cluster create "
                f"{nodes}, with --cluster-replicas 1 for six of them or more"
            )
        apart = self._strangers(best)
        if apart:
            return fail(
                f"{' and '.join(map(shown, apart))} are of different clusters, whose namespaces differ: name the nodes "
                "of one alone"
            )
        owner = self._owner(best)
        if owner is None:
            return fail(
                f"no node has slot {self._slot}, where the namespace is, and {self.lost - 1} more of {SLOTS} are "
                f"without one: start the nodes that had them, or {self.fix}"
            )
        if "fail" in owner.flags:
            return fail(
                f"{shown(owner.host)}, the primary of the namespace, is down, and no replica took over: start it; "
                "or a failover is under way: look again in a moment"
            )
        moving = self._moving(best)
        if moving:
            return warn(
                f"slot {self._slot}, where the namespace is, is half moved ({moving}): what runs over several keys may "
                f"be refused. Unless somebody is moving it now: {self.fix}"
            )
        if alone:
            return warn(
                f"{', '.join(map(shown, alone))} is a node of no cluster: redis-cli --cluster add-node "
                f"{shown(alone[0])} {shown(owner.host)}, or leave it out of the URL"
            )
        if self.lost:
            return warn(
                f"{counted(self.lost, 'slot')} of {SLOTS} without a node, none of them the namespace's: start the "
                f"nodes that had them, or {self.fix}"
            )
        return None

    def failover(self, replicas: int, wanted: int) -> Said:
        """Whether a replica could take over from the namespace's primary, of which so many are connected to it, and so
        many must be for it to take writes.
        """
        best = self._best
        owner = None if best is None else self._owner(best)
        assert best is not None
        assert owner is not None
        known = [node for node in best.nodes if node.primary == owner.id and node.is_up]
        electors = [node for node in best.nodes if node.slots]
        remedies = []
        if not known:
            remedies.append(
                f"{shown(owner.host)} has no replica that is up: redis-cli --cluster add-node HOST:PORT "
                f"{shown(owner.host)} --cluster-slave --cluster-master-id {owner.id}"
            )
        remedies += _too_few(replicas, wanted)
        if len(electors) < _ELECTORS:
            what = "one primary has slots" if len(electors) == 1 else f"{len(electors)} primaries have slots"
            remedies.append(f"{what}, of which no majority is left when one ends: have three")
        else:
            up = [node for node in electors if node.is_up]
            if len(up) <= len(electors) // 2 + 1:
                remedies.append(f"{len(up)} of {len(electors)} primaries are up: start the others")
        if remedies:
            return warn(f"nothing takes over when the namespace's primary ends: {'; '.join(remedies)}")
        return ok(f"{counted(len(known), 'replica')} of {shown(owner.host)} can take over")

    # ---

    @property
    def _best(self) -> View | None:
        """The one that knows most, and newest."""

        def rank(view: View) -> Any:
            return view.slot_count > 0, max(node.epoch for node in view.nodes), len(view.nodes)

        return max(self._views.values(), key=rank, default=None)

    def _owner(self, view: View) -> _Node | None:
        return next((node for node in view.nodes if node.has(self._slot)), None)

    def _strangers(self, best: View) -> tuple[Host, Host] | None:
        """Two that know nothing of each other, and serve slots each in a cluster of its own."""
        at = next(host for host, view in self._views.items() if view is best)
        for host, view in self._views.items():
            if view.slot_count and view.myself.id not in best.ids and best.myself.id not in view.ids:
                return at, host
        return None

    def _moving(self, best: View) -> str:
        """Who gives the slot to whom, or takes it from whom; each node says so of itself alone."""
        known = {node.id: shown(node.host) for node in best.nodes}
        told = []
        for view in self._views.values():
            move = view.myself.moves.get(self._slot)
            if move is not None:
                leaves, other = move
                verb = "gives it to" if leaves else "takes it from"
                told.append(f"{shown(view.myself.host)} {verb} {known.get(other, 'a node that is gone')}")
        return ", ".join(Counter(told))
