"""Dialing: names that are not resolved, addresses that do not answer, and who gets how much of the time."""

from __future__ import annotations

import gc
import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.stores.contract import WITHIN_S, in_a_fork
from tests.support.waiting import wait_until
from veltrix_mw.stores import dialing
from veltrix_mw.stores.dialing import NameTimeout, addresses_of, dial

LONG_S = 600.0


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


class Resolver:
    """What stands in for the resolver: answers names with addresses, or hangs until it is let go."""

    def __init__(self, addresses: list[tuple[str, int]]) -> None:
        self.addresses = addresses
        self.answering = threading.Event()
        self.asked = 0

    def __call__(self, host: str, port: int, *options: int) -> list[Any]:
        if len(options) > 3:
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        self.asked += 1
        assert self.answering.wait(WITHIN_S)
        kind = socket.AF_INET, socket.SOCK_STREAM, 0, ""
        return [(*kind, address) for address in self.addresses]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch, listening: socket.socket) -> Iterator[Resolver]:
    found = Resolver([listening.getsockname()])
    monkeypatch.setattr(dialing.socket, "getaddrinfo", found)
    yield found
    found.answering.set()
    wait_until(
        lambda: not dialing._asking, WITHIN_S, reason="nobody asks any more: another test asks for the same name"
    )


def soon_s(timeout_s: float = WITHIN_S) -> float:
    return time.monotonic() + timeout_s


def test_a_host_is_dialled_by_name_and_by_number(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    for host in ("127.0.0.1", "localhost"):
        with dial(host, port, soon_s()) as connected:
            assert connected.getpeername()[1] == port


def test_a_name_that_is_not_resolved_ends_by_the_deadline(resolver: Resolver) -> None:
    with pytest.raises(NameTimeout):
        dial("h1", 1, soon_s(0.05))


def test_a_resolver_that_hangs_costs_one_thread_a_name(resolver: Resolver) -> None:
    for _ in range(5):
        with pytest.raises(NameTimeout):
            addresses_of("h1", 1, soon_s(0.01))
    assert resolver.asked == 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(addresses_of, "h1", 1, soon_s())
        resolver.answering.set()
        assert waiting.result(WITHIN_S)
    addresses_of("h1", 1, soon_s())
    assert resolver.asked <= 3  # asked anew, once the answer was given


def test_a_child_does_not_wait_for_a_thread_of_its_parent(resolver: Resolver) -> None:
    with pytest.raises(NameTimeout):
        addresses_of("h1", 1, soon_s(0.01))

    def child() -> None:
        resolver.answering.set()
        assert addresses_of("h1", 1, soon_s())

    in_a_fork(child)


def test_an_unknown_name_is_the_resolvers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no-such-host.invalid", "x" * 300):
        with pytest.raises(OSError) as caught:
            dial(name, 1, soon_s())
        assert not isinstance(caught.value, NameTimeout)
    monkeypatch.setattr(dialing.socket, "getaddrinfo", lambda *_: [])
    with pytest.raises(OSError, match="has no address"):
        dial("h1", 1, soon_s())


def test_an_address_that_refuses_is_passed_over(resolver: Resolver, free_port: int) -> None:
    resolver.addresses.insert(0, ("127.0.0.1", free_port))
    resolver.answering.set()
    with dial("h1", 1, soon_s()) as connected:
        assert connected.getpeername() == resolver.addresses[1]
    with pytest.raises(ConnectionRefusedError):
        resolver.addresses.pop()
        dial("h1", 1, soon_s())


def test_each_address_gets_its_share_of_the_time(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that does not answer must not take all of it: measured by a clock of the test's own."""
    resolver.addresses = [("10.0.0.1", 1), ("10.0.0.2", 1), ("10.0.0.3", 1)]
    resolver.answering.set()
    now, granted = [1000.0], list[float]()

    class Hanging:
        def __init__(self, *_: object) -> None:
            self.timeout_s = 0.0

        def settimeout(self, timeout_s: float) -> None:
            self.timeout_s = timeout_s

        def setsockopt(self, *_: object) -> None: ...

        def connect(self, _: object) -> None:
            granted.append(self.timeout_s)
            now[0] += self.timeout_s
            raise TimeoutError

        def close(self) -> None: ...

    monkeypatch.setattr(dialing, "addresses_of", lambda *_: addresses)
    kind = socket.AF_INET, socket.SOCK_STREAM, 0, ""
    addresses = [(*kind, address) for address in resolver.addresses]
    monkeypatch.setattr(dialing.socket, "socket", Hanging)
    monkeypatch.setattr(dialing.time, "monotonic", lambda: now[0])
    with pytest.raises(TimeoutError):
        dial("h1", 1, now[0] + 6)
    assert granted == [pytest.approx(2.0)] * 3
    granted.clear()
    with pytest.raises(TimeoutError):
        dial("h1", 1, now[0])
    assert granted == []


def test_what_finishes_a_connection_may_send_it_to_the_next_address(
    resolver: Resolver, listening: socket.socket
) -> None:
    resolver.addresses *= 2
    resolver.answering.set()
    seen: list[socket.socket] = []

    def finish(raw: socket.socket) -> socket.socket:
        assert 0 < (raw.gettimeout() or 0) <= WITHIN_S
        seen.append(raw)
        if len(seen) == 1:
            raise TimeoutError
        return raw

    with dial("h1", 1, soon_s(), finish=finish) as connected:
        assert connected is seen[1]
    assert seen[0].fileno() == -1

    def broken(raw: socket.socket) -> socket.socket:
        seen.append(raw)
        raise ValueError

    with pytest.raises(ValueError):  # any that is no OSError
        dial("h1", 1, soon_s(), finish=broken)
    assert seen[-1].fileno() == -1


def test_a_handshake_with_one_who_is_gone_leaves_no_socket_open(listening: socket.socket) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def finish(raw: socket.socket) -> socket.socket:
        peer, _ = listening.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()  # by a reset

        def is_gone() -> bool:
            try:
                raw.getpeername()
            except OSError:
                return True
            return False

        wait_until(is_gone, WITHIN_S, reason="the reset has arrived")
        return context.wrap_socket(raw)

    def fail() -> None:
        with (
            pytest.raises(OSError),
            dial(*listening.getsockname()[:2], time.monotonic() + WITHIN_S, finish=finish) as it,
        ):
            it.send(b"x")  # by the interpreter's version the handshake failed, or this does

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        fail()
        gc.collect()
    assert told == []
