"""The diagnosis: what may be wrong between this machine and a namespace, looked at in the order that it would matter.

Owns which parts are looked at, and what authority and mirror must agree on; each store's probe knows its own. Needs no
app and no client, follows nothing, and leaves no key behind on any server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Final, Protocol

from veltrix_mw.errors import Compacted, SettingsError, StoreError
from veltrix_mw.findings import Finding, Said, State, Step, examine, fail, not_made, ok, warn
from veltrix_mw.keys import check_prefix
from veltrix_mw.protocols import Position, Restored, Store
from veltrix_mw.settings import StoreUrl, find_mirror_url, find_url, parse_url
from veltrix_mw.stores.etcd3_package import said_of_etcd3
from veltrix_mw.stores.opening import open_mirror, open_mirror_probe, open_probe, open_store

if TYPE_CHECKING:
    from veltrix_mw.stores.redis_probe import RedisProbe

__all__ = ["Finding", "State", "diagnose"]

AUTHORITY: Final = "authority"
MIRROR: Final = "mirror"
LAST_KNOWN_GOOD: Final = "last-known-good"

CHECK_S: Final = 2.0
"""How long a check may take: what a call may by default. A URL's own `timeout_s` counts, up to ..."""

CHECK_MOST_S: Final = 5.0
"""... this: a diagnosis is to end while somebody waits for it."""

_SETTLE_SHARE: Final = 0.5  # of a check's time: what is on its way to a mirror that is fed comes within milliseconds
_AGAIN_S: Final = 0.1


class Probe(Protocol):
    """What looks at one store."""

    @property
    def steps(self) -> tuple[Step, ...]: ...

    def close(self) -> None: ...


def diagnose(
    url: str | None = None,
    *,
    mirror: str | None = None,
    namespace: str | None = None,
    lazy: Sequence[str] = (),
    last_known_good: str | os.PathLike[str] | None = None,
) -> Iterator[Finding]:
    """Look at authority, mirror and last-known-good folder; yields each finding as it is made.

    The arguments mean what they mean to `ConfigClient`, environment included; what is wrong with a URL is a finding.
    Raises `SettingsError` where `lazy` holds no prefixes. Each check of a server ends within `CHECK_S`, or the URL's
    `timeout_s` up to `CHECK_MOST_S`, and at most half a second after.
    """
    try:
        prefixes = tuple(check_prefix(prefix) for prefix in lazy)
    except ValueError as exc:
        raise SettingsError(f"lazy: {exc}") from exc
    with ExitStack() as stack:
        parsed, said = _parsed_authority(url, namespace)
        store: Store | None = None
        probe: Probe | None = None
        if parsed is not None:
            try:
                # What an app could not open is told; nothing is connected.
                store = stack.enter_context(closing(open_store(parsed)))
                opened = open_probe(parsed, lazy=prefixes, timeout_s=_timeout_s(parsed))
                probe = stack.enter_context(closing(opened))
            except SettingsError as exc:
                said = fail(str(exc))
        steps = [Step("url", lambda _: said), *(() if probe is None else probe.steps)]
        package = said_of_etcd3()
        if (
            package is not None
        ):  # of this machine: whatever the URL is, and where there is none, as with a client handed in
            steps.append(Step("etcd3", lambda _: package))
        is_read = False
        for finding in examine(AUTHORITY, steps, timeout_s=_timeout_s(parsed)):
            is_read = is_read or (finding.check == "read" and finding.state in {State.OK, State.WARN})
            yield finding
        mirror = find_mirror_url(None) if mirror is None else mirror
        if mirror:
            yield from _mirror_findings(mirror, parsed, store if is_read else None, prefixes, stack)
        if last_known_good is not None:
            yield from _folder_findings(last_known_good, parsed, store)


def _parsed_authority(url: str | None, namespace: str | None) -> tuple[StoreUrl | None, Said]:
    try:
        parsed = parse_url(find_url(url), namespace=namespace)
    except SettingsError as exc:
        return None, fail(str(exc))
    if parsed.scheme == "memory":
        return None, fail("a memory:// store lives in one process; name one that is shared, as sqlite:///config.db")
    return parsed, ok(parsed.redacted)


def _timeout_s(url: StoreUrl | None) -> float:
    return CHECK_S if url is None else min(CHECK_MOST_S, float(url.options.get("timeout_s", CHECK_S)))


def _mirror_findings(
    url: str, authority: StoreUrl | None, store: Store | None, lazy: tuple[str, ...], stack: ExitStack
) -> Iterator[Finding]:
    """`store` is the authority, where it can be read."""
    parsed, said, agreed = _parsed_mirror(url, authority)
    steps = [Step("url", lambda _: said), Step("namespace", lambda _: agreed, needs=("url",))]
    if parsed is not None:
        try:
            open_mirror(parsed).close()
            probe = open_mirror_probe(parsed, lazy=lazy, timeout_s=_timeout_s(parsed))
        except SettingsError as exc:
            said = fail(str(exc))
        else:
            stack.callback(probe.close)
            found = probe
            steps += [
                *probe.steps,
                Step("agreement", lambda by_s: _agreement(store, found, by_s), needs=("namespace", "read")),
            ]
    yield from examine(MIRROR, steps, timeout_s=_timeout_s(parsed))


def _parsed_mirror(url: str, authority: StoreUrl | None) -> tuple[StoreUrl | None, Said, Said]:
    """The mirror's URL taken apart, what is said of it, and what is said of its namespace."""
    unsaid = not_made("because of the authority's url, which names it")
    given = None if authority is None else authority.namespace
    try:
        own = _own_namespace(url)
        parsed = parse_url(url, namespace=own or given or "unknown")
        if not parsed.is_redis:
            raise SettingsError(f"a mirror is a Redis, for example redis://h4:6379/0; not {parsed.scheme}://")
    except SettingsError as exc:
        return None, fail(str(exc)), unsaid
    said = ok(parsed.redacted)
    if given is None:
        return (parsed if own else None), said, unsaid
    if own is not None and own != given:
        return (
            replace(parsed, namespace=given),
            said,
            fail(
                f"the authority's namespace is {given!r}, and the mirror's URL names {own!r}: leave ?namespace= out "
                "there, a mirror takes the authority's"
            ),
        )
    return parsed, said, ok(f"{given!r}, the authority's")


def _own_namespace(url: str) -> str | None:
    """The namespace that a mirror's URL names, None for none; what else is wrong with it is for others to tell."""
    try:
        return parse_url(url).namespace
    except SettingsError:
        return None


def _agreement(authority: Store | None, mirror: RedisProbe, by_s: float) -> Said:
    """Whether the mirror holds the authority's history, and how far it is behind."""
    if authority is None:
        return not_made("the authority cannot be read")
    settled_s, pause = by_s - _SETTLE_SHARE * (by_s - time.monotonic()), Event()
    while True:
        position = mirror.position
        assert position is not None
        if not position.incarnation:
            return not_made("the mirror is empty")
        said = _compared(authority, position, by_s)
        if said.state in {State.OK, State.NOT_MADE} or time.monotonic() >= settled_s:
            return said
        pause.wait(_AGAIN_S)
        mirror.look_again(by_s)


def _compared(authority: Store, position: Position, by_s: float) -> Said:
    """What the authority says of where its mirror stands."""
    remedy = (
        "it is fed from another authority, or from this one before a restore. Give each authority a db or namespace of "
        "its own; a relay of this one fills the mirror anew"
    )
    here = f"the mirror is at revision {position.revision} of incarnation {position.incarnation}"
    try:
        confirmation = authority.confirm(position, timeout_s=by_s - time.monotonic())
    except Restored:
        return fail(f"{here}, which is of another history than the authority's: {remedy}")
    except Compacted:
        return fail(f"{here}, which the authority does not keep any more, so it may be of another history: {remedy}")
    except StoreError as exc:
        return not_made(f"the authority was not to be asked: {exc}")
    if confirmation.incarnation != position.incarnation:
        return fail(f"{here}, and the authority at incarnation {confirmation.incarnation or 'none'}: {remedy}")
    behind = confirmation.revision - position.revision
    if behind <= 0:
        return ok(f"both at incarnation {position.incarnation}, the mirror at revision {position.revision}")
    return warn(
        f"{here}, {behind} behind the authority's {confirmation.revision}, and does not catch up: look at the relay "
        "and its log"
    )


def _folder_findings(
    folder: str | os.PathLike[str], authority: StoreUrl | None, store: Store | None
) -> Iterator[Finding]:
    from veltrix_mw.disk_probe import DiskProbe

    if authority is None:
        why = "because of the authority's url, which names the namespace"
        yield Finding(LAST_KNOWN_GOOD, "folder", State.NOT_MADE, why)
        return
    origin = authority.redacted if store is None else store.info.url
    probe = DiskProbe(folder, namespace=authority.namespace, origin_url=origin)
    yield from examine(LAST_KNOWN_GOOD, probe.steps, timeout_s=CHECK_S)
