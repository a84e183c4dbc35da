"""The guides' part of a diagnosis: asks the sentinels or nodes of a URL what they know, for what is made of it.

Owns the questions, and what it means that they are refused. What the answers mean is the formation's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from veltrix_mw.errors import AuthFailed, StoreError
from veltrix_mw.findings import Said, fail, warn
from veltrix_mw.protocols import NotPermitted, Silent
from veltrix_mw.settings import Host, StoreUrl, shown
from veltrix_mw.stores.network_probe import Fault, ask_each
from veltrix_mw.stores.redis_formation import NodesSeen, SentinelsSeen, view_of
from veltrix_mw.stores.redis_link import RedisLink
from veltrix_mw.stores.redis_routes import Guided, Nodes, Sentinels
from veltrix_mw.words import counted

__all__ = ["GuidesProbe"]

_MOST_PRIMARIES: Final = 16  # that are asked beside those that the URL names


class GuidesProbe:
    """Looks at the guides of a URL, together. `seen` is what they said, once some of them answered."""

    def __init__(self, url: StoreUrl, route: Guided, link: RedisLink) -> None:
        self._url = url
        self._route = route
        self._link = link
        self.seen: SentinelsSeen | NodesSeen | None = None

    def look(self, hosts: Sequence[Host], by_s: float) -> Said | None:
        """What is wrong with them; None where nothing is, or where whoever finds the server will say it."""
        is_set = isinstance(self._route, Sentinels)
        questions = self._questions
        results = self._asked(hosts, questions, by_s)
        faults = {host: result for host, result in results.items() if isinstance(result, StoreError)}
        if len(faults) == len(results):
            if all(isinstance(each, Silent) for each in faults.values()):
                what = "sentinels" if is_set else "nodes"
                return fail(
                    f"none of the {what} ({', '.join(map(shown, faults))}) answers in time, and they take connections: "
                    "are the processes stopped, or their machines overloaded?"
                )
            refused = next((each for each in faults.values() if isinstance(each, AuthFailed)), None)
            return None if refused is None else self._refused(refused)
        answers = {host: result[0] for host, result in results.items() if not isinstance(result, StoreError)}
        fault = self._sentinels(answers) if is_set else self._nodes(answers, hosts, questions, by_s)
        if fault is None and faults:
            told = "; ".join(dict.fromkeys(map(str, faults.values())))
            return warn(f"{len(answers)} of {len(results)} are well, the others not: {told}")
        return fault

    def failover(self, replicas: int, wanted: int) -> Said | None:
        """Whether another server could take over; `replicas` is how many are connected to the primary, `wanted` how
        many it needs to take writes.
        """
        return None if self.seen is None else self.seen.failover(replicas, wanted)

    def uncovered(self) -> str:
        """That slots of the cluster are nobody's, and what to do; '' where none are."""
        seen = self.seen
        if not isinstance(seen, NodesSeen) or not seen.lost:
            return ""
        slots = f"{counted(seen.lost, 'slot')} without a node, so the cluster serves nothing"
        return f"{slots}: start those that had them, or {seen.fix}"

    # ---

    @property
    def _questions(self) -> Sequence[tuple[str, ...]]:
        """All that the route asks, as each may be refused; what is looked at comes first."""
        if isinstance(self._route, Sentinels):
            name = self._url.name
            return ("SENTINEL", "MASTER", name), ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
        return ("CLUSTER", "NODES"), ("CLUSTER", "SLOTS")

    def _sentinels(self, answers: dict[Host, Any]) -> Said | None:
        said = {
            host: {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in _pairs(fields)}
            for host, fields in answers.items()
        }
        self.seen = seen = SentinelsSeen(self._url.name, said, named=len(self._url.hosts))
        return seen.fault()

    def _nodes(
        self, answers: dict[Host, Any], hosts: Sequence[Host], questions: Sequence[tuple[str, ...]], by_s: float
    ) -> Said | None:
        assert isinstance(self._route, Nodes)
        views = {host: view for host, reply in answers.items() if (view := view_of(reply, host))}
        seen = NodesSeen(self._route.slot, views, named=self._url.hosts)
        others = [host for host in seen.primaries if host not in hosts][:_MOST_PRIMARIES]
        for host, result in self._asked(others, questions[:1], by_s).items():
            # They are asked for what each says of itself alone; one that is away is told of by the others.
            if not isinstance(result, StoreError) and (view := view_of(result[0], host)):
                views[host] = view
        self.seen = seen = NodesSeen(self._route.slot, views, named=self._url.hosts)
        return seen.fault()

    def _asked(
        self, hosts: Sequence[Host], questions: Sequence[tuple[str, ...]], by_s: float
    ) -> dict[Host, list[Any] | StoreError]:
        def ask(host: Host) -> tuple[list[Any], StoreError | None]:
            try:
                return self._link.ask(host, questions, by_s), None
            except Silent:  # within how much of the check's time would tell nobody anything
                return [], Silent(f"{self._route.called(host)} did not answer in time: is it stopped, or overloaded?")
            except StoreError as exc:
                return [], exc

        results: dict[Host, list[Any] | StoreError] = {}
        for host, result in ask_each(hosts, ask, by_s).items():
            if isinstance(result, Fault):
                results[host] = Silent(str(result))
            else:
                replies, error = result
                results[host] = replies if error is None else error
        return results

    def _refused(self, refused: AuthFailed) -> Said | None:
        if isinstance(self._route, Sentinels):
            needs = ""
            if isinstance(refused, NotPermitted):
                user = self._url.sentinel_user or "default"
                needs = (
                    f": on each sentinel, redis-cli -p 26379 ACL SETUSER {user} "
                    "+sentinel|get-master-addr-by-name +sentinel|master"
                )
            return fail(f"{refused}{needs}")
        if isinstance(refused, NotPermitted):
            user = self._url.user or "default"
            return fail(f"{refused}: on each node, redis-cli ACL SETUSER {user} +asking +cluster|slots +cluster|nodes")
        return None  # a matter of the user, which is another check


def _pairs(fields: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(fields[::2], fields[1::2], strict=True))
