"""The link to a Redis: how long a late answer may be asked about, and what an error means."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from redis import exceptions as errors

from veltrix_mw.protocols import NotPermitted
from veltrix_mw.settings import Host
from veltrix_mw.stores.redis_link import RedisLink
from veltrix_mw.stores.redis_routes import Sentinels, Word

WITHIN_S = 20.0


def made(guide: Host = ("s1", 1)) -> RedisLink:
    options: dict[str, Any] = dict.fromkeys(("user", "password", "ca", "cert", "key"))
    return RedisLink(Sentinels([guide], "m"), db=0, namespace="shop", tls=False, **options)


def test_a_command_that_valkey_refuses_within_a_script_is_named() -> None:
    said = "ACL failure in script: User r has no permissions to run the 'hset' command script: on @user_script:1."
    with pytest.raises(NotPermitted) as raised, made().translating(1.0):
        raise errors.ResponseError(said)
    assert raised.value.lacking == "+hset"


@pytest.mark.parametrize("left_s", [0.1, 60.0])
def test_whether_a_late_answer_counts_is_asked_within_the_calls_deadline(left_s: float) -> None:
    link = made()
    asked_until_s: list[float] = []
    words: list[Word] = []

    def look(deadline_s: float, word: Word) -> tuple[str, int]:
        asked_until_s.append(deadline_s)
        words.append(word)
        return "h1", 1

    link.look = look  # type: ignore[method-assign]
    deadline_s = time.monotonic() + left_s
    link.check_late(SimpleNamespace(host=None), time.monotonic() - 9, deadline_s)  # type: ignore[arg-type]
    assert words == [Word.RECENT]  # the first that answers may not know what the others do
    assert asked_until_s[0] <= min(deadline_s, time.monotonic() + 1)


def test_what_was_opened_to_a_guide_while_the_link_was_closed_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        host = server.getsockname()[:2]
        link = made(host)
        closed = threading.Event()
        named = link._route.called  # type: ignore[union-attr]

        def called(host: Host) -> str:
            link.close()  # by another thread, just before the guide's own link is made
            closed.set()
            return named(host)

        link._route.called = called  # type: ignore[union-attr, method-assign]
        asking = threads.submit(link.ask, host, [("PING",)], time.monotonic() + WITHIN_S)
        peer, _ = server.accept()
        with peer:
            peer.settimeout(WITHIN_S)
            assert peer.recv(64)
            peer.sendall(b"+PONG\r\n")
            assert asking.result(WITHIN_S)
            assert closed.is_set()
            assert peer.recv(64) == b"", "the connection was closed"
