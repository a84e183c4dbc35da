"""`watch`, as a process, while another one writes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.conftest import Shell
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw import Delete
from veltrix_mw import Put as PutOperation

Put = Callable[[str, Any], int]


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_watch_prints_each_change_that_another_process_writes(shell: Shell, put: Put) -> None:
    put("k", 50)
    with shell.running("watch", "--count", "3") as watching:
        watching.until("watching from revision 1")
        assert shell.process("put", "k", "80", "--reason", "sale").code == 0
        watching.until("2\tk\t50 → 80\t(ana: sale)\n")
        shell.ok("put", "new", "1")
        shell.ok("delete", "k", "--author", "")
        assert watching.code() == 0
        assert watching.text.splitlines()[1:] == [
            "2\tk\t50 → 80\t(ana: sale)",
            "3\tnew\t(absent) → 1\t(ana)",
            "4\tk\t80 → (absent)",
        ]


def test_watch_in_json_leaves_out_what_is_absent(shell: Shell, put: Put) -> None:
    put("k", None)
    with shell.running("--json", "watch", "--count", "2") as watching:
        watching.until("watching")
        shell.ok("delete", "k")
        shell.ok("put", "k", "null")
        assert watching.code() == 0
        first, second = json_lines(watching.text)
    assert first == {"revision": 2, "key": "k", "old": None, "author": "ana", "reason": ""}
    assert second == {"revision": 3, "key": "k", "new": None, "author": "ana", "reason": ""}


def test_a_burst_is_shown_version_by_version_and_a_revision_whole(shell: Shell, put: Put) -> None:
    put("k", 0)
    with shell.running("--json", "watch", "--count", "52") as watching:
        watching.until("watching")
        with shell.client() as client:
            for number in range(1, 51):
                client.put("k", number)
            client.write([PutOperation("a", 1), Delete("k")])
        assert watching.code() == 0
        lines = json_lines(watching.text)
    assert [(line["revision"], line["key"]) for line in lines] == [
        *((revision, "k") for revision in range(2, 52)),
        (52, "a"),
        (52, "k"),
    ]
    assert [(line["old"], line["new"]) for line in lines[:50]] == [(number - 1, number) for number in range(1, 51)]


def test_watch_takes_a_prefix(shell: Shell, put: Put) -> None:
    put("a/x", 1)
    with shell.running("watch", "a", "--count", "1") as watching:
        watching.until("watching below 'a'")
        put("ab", 1)
        put("a/x", 2)
        assert watching.code() == 0
        assert "a/x" in watching.text
        assert "ab\t" not in watching.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_ends_well_when_it_is_told_to(shell: Shell, put: Put, number: signal.Signals) -> None:
    put("k", 1)
    with shell.running("watch") as watching:
        watching.until("watching")
        assert watching.signalled(number) == 0
        assert len(watching.text.splitlines()) == 1


def test_watch_of_a_store_that_is_away_says_so(shell: Shell) -> None:
    done = shell.process("watch")
    assert (done.code, done.out) == (5, "")
    assert "does not exist yet" in done.err
    assert len(done.err.splitlines()) == 1


# Over a mirror


def watched(server: RedisServer) -> bool:
    """Whether somebody waits for the mirror's next change."""
    return bool(server.client.info("clients")["blocked_clients"])


def test_watch_follows_the_mirror_and_goes_on_when_that_dies(shell: Shell, put: Put) -> None:
    put("k", 50)
    with redis_server() as server:
        mirror = ("--mirror", f"redis://127.0.0.1:{server.port}/0")
        with shell.running("relay", *mirror) as relay, shell.running("watch", "--count", "2", *mirror) as watching:
            relay.until("refilled")
            watching.until("watching from revision 1")
            wait_until(lambda: watched(server), 60, reason="the watch to follow the mirror")
            put("k", 80)
            watching.until("2\tk\t50 → 80")
            server.kill()
            put("k", 81)
            assert watching.code() == 0
            assert "3\tk\t80 → 81" in watching.text
            assert "warning: veltrix.failover" in watching.text


def test_watch_follows_a_mirror_that_leaves_out_what_lazy_names(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 50)
    mirror = ("--mirror", f"redis://127.0.0.1:{redis.port}/0", "--lazy", "tenants/")
    with shell.running("relay", *mirror) as relay:
        relay.until("refilled")
        with shell.running("watch", "--count", "1", *mirror) as watching:
            watching.until("watching from revision 1")
            wait_until(lambda: watched(redis), 60, reason="the watch to follow the mirror")
            put("tenants/acme/limit", 1)
            put("k", 80)
            assert watching.code() == 0
            assert "3\tk\t50 → 80" in watching.text
            assert "tenants" not in watching.text
