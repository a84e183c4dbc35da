"""`relay`, as a process: what it prints, how it ends, and what it waits for."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cli.conftest import Running, Shell
from tests.support.etcd_servers import etcd
from tests.support.proxy import Proxy
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, SettingsError

Put = Callable[[str, Any], int]

ENTRIES: Final = "veltrix:{default}:entries"
LEASE: Final = "veltrix:{default}:lease"
CONVERGED_S: Final = 30.0  # an end to waiting in vain


def options(server: RedisServer, login: str = "") -> tuple[str, str]:
    return ("--mirror", f"redis://{login}127.0.0.1:{server.port}/0")


def events(relay: Running) -> list[dict[str, Any]]:
    return [json.loads(line) for line in relay.text.splitlines() if line.startswith("{")]


def mirrored(server: RedisServer, key: str) -> Any:
    """The value that the mirror holds."""
    raw = server.run("HGET", ENTRIES, key)
    return None if raw is None else json.loads(raw.partition(b" ")[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_relay_feeds_the_mirror_and_gives_up_its_lease_when_it_is_ended(
    shell: Shell, put: Put, redis: RedisServer, number: signal.Signals
) -> None:
    put("k", 50)
    with shell.running("relay", *options(redis), "--instance", "feeder") as relay:
        relay.until("refilled: revision 1, entries 1 (it was empty)\n")
        assert mirrored(redis, "k") == 50
        put("k", 80)
        wait_until(lambda: mirrored(redis, "k") == 80, CONVERGED_S, reason="the change in the mirror")
        assert redis.run("GET", LEASE).endswith(b" feeder")
        assert relay.signalled(number) == 0
        assert redis.run("GET", LEASE) is None
        announced, *lines = relay.text.splitlines()
    assert announced == f"relaying {shell.url} to redis://127.0.0.1:{redis.port}/0 as feeder, Ctrl-C ends"
    assert lines == [
        "elected: this is the relay now",
        "refilled: revision 1, entries 1 (it was empty)",
        "stopped",
    ]


def test_one_is_the_relay_and_the_other_stands_by_and_takes_over(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    with shell.running("relay", *options(redis), "--instance", "first") as first:
        first.until("refilled")
        with shell.running("relay", *options(redis), "--instance", "second") as second:
            second.until("standing by: first is the relay\n")
            assert first.signalled(signal.SIGTERM) == 0
            second.until("elected")
            second.until("resumed: revision 1\n")
            put("k", 2)
            wait_until(lambda: mirrored(redis, "k") == 2, CONVERGED_S, reason="the change in the mirror")
            assert "refilled" not in second.text
            assert second.text.count("standing by") == 1


def test_in_json_each_turn_is_an_object_without_a_key_or_a_value(shell: Shell, put: Put) -> None:
    put("checkout/k3y", "v4lue")
    with (
        redis_server("--requirepass", "s3cret") as server,
        shell.running("--json", "relay", *options(server, ":s3cret@")) as relay,
    ):
        relay.until('"refilled"')
        server.kill()
        relay.until('"mirror_failed"')
        assert relay.signalled(signal.SIGTERM) == 0
        told = events(relay)
        text = relay.text
    assert [one["event"] for one in told] == ["elected", "refilled", "mirror_failed", "stopped"]
    assert (told[1]["revision"], told[1]["entries"], told[1]["reason"]) == (1, 1, "it was empty")
    assert all(one["time_s"] > 0 for one in told)
    assert str(server.port) in told[2]["reason"]
    for secret in ("s3cret", "k3y", "v4lue"):
        assert secret not in text


def test_it_waits_for_a_mirror_that_is_away(shell: Shell, put: Put) -> None:
    put("k", 1)
    with redis_server() as server:
        server.kill()
        with shell.running("relay", *options(server)) as relay:
            relay.until("mirror unreachable: ")
            server.start()
            relay.until("mirror answers again\nelected: this is the relay now\n")
            relay.until("refilled")
            server.restart()  # with nothing in it
            relay.until("refilled", count=2)
            assert mirrored(server, "k") == 1


def test_a_relay_that_stands_by_says_that_it_does_not_reach_the_authority_itself(
    shell: Shell, put: Put, redis: RedisServer
) -> None:
    put("k", 1)
    with redis_server() as authority:
        shell.store = f"redis://127.0.0.1:{authority.port}/0?namespace=default"
        put("k", 1)
        with (
            contextlib.closing(Proxy(authority.port)) as proxy,
            shell.running("relay", *options(redis), "--instance", "first") as first,
        ):
            first.until("refilled")
            cut_off = f"redis://127.0.0.1:{proxy.port}/0?namespace=default"
            with shell.running("relay", *options(redis), "--url", cut_off) as second:
                second.until("standing by: first is the relay\n")
                proxy.refuse()
                second.until("authority unreachable: ")
                proxy.heal()
                second.until("authority answers again\n")
            assert second.text.count("authority unreachable") == 1
            assert "elected" not in second.text


def test_it_waits_for_an_authority_that_is_away(shell: Shell, put: Put, redis: RedisServer) -> None:
    with shell.running("relay", *options(redis)) as relay:
        relay.until("authority unreachable: ")
        put("k", 1)
        relay.until("authority answers again\n")
        relay.until("refilled")
        assert mirrored(redis, "k") == 1
        assert relay.text.count("authority unreachable") == 1


def test_it_ends_while_the_mirror_hangs(shell: Shell, put: Put) -> None:
    put("k", 1)
    with redis_server() as server, shell.running("relay", *options(server)) as relay:
        relay.until("refilled")
        server.stop()
        try:
            assert relay.signalled(signal.SIGTERM) == 0
        finally:
            server.cont()


@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_credentials_of_the_mirror_end_it_with_what_to_do(shell: Shell, put: Put, as_json: bool) -> None:
    put("k", 1)
    with redis_server("--requirepass", "right") as server:
        done = shell.process("relay", *options(server, ":wr0ng@"), *(["--json"] if as_json else []))
    assert (done.code, done.out) == (6, "")
    announced, error = done.err.splitlines()
    assert announced.startswith("relaying ")
    assert "the mirror refuses this relay" in error
    assert "wr0ng" not in done.err
    if as_json:
        assert json.loads(error)["error"]["type"] == "AuthFailed"
    else:
        assert error.startswith("error: ")


def test_a_user_who_may_only_read_the_mirror_is_refused(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    redis.run("ACL", "SETUSER", "worker", "on", ">pw", "%R~veltrix:{default}:*", "+@read", "+@connection", "+time")
    done = shell.process("relay", *options(redis, "worker:pw@"))
    assert (done.code, done.out) == (6, "")
    assert mirrored(redis, "k") is None


def test_wrong_credentials_of_the_authority_end_it_also_while_another_one_leads(
    shell: Shell, redis: RedisServer
) -> None:
    with etcd() as cluster:
        cluster.turn_auth_on(ann="right")
        cluster.grant("ann", "default/", ".veltrix/default/")
        host, port = cluster.hosts[0]
        with shell.client_of(f"etcd://ann:right@{host}:{port}/default") as client:
            client.put("k", 1)
        shell.store = f"etcd://ann:right@{host}:{port}/default"
        with shell.running("relay", *options(redis)) as leader:
            leader.until("refilled")
            assert "ann" not in leader.text
            shell.store = f"etcd://ann:wr0ng@{host}:{port}/default"
            done = shell.process("relay", *options(redis))
    assert (done.code, done.out) == (6, "")
    assert len(done.err.splitlines()) == 1
    assert "wr0ng" not in done.err


def test_without_a_mirror_there_is_nothing_to_feed(shell: Shell, put: Put) -> None:
    put("k", 1)
    done = shell.run("relay", "--json")
    assert (done.code, done.out, done.error["type"]) == (2, "", "SettingsError")
    assert "VELTRIX_MIRROR_URL" in done.error["message"]
    shell.environ["VELTRIX_URL"] = ""
    assert shell.process("relay", "--mirror", "redis://127.0.0.1:1/0").code == 2


def test_lazy_is_a_list_of_prefixes_before_or_after_the_verb(shell: Shell, put: Put, redis: RedisServer) -> None:
    for key in ("a/x", "b/x", "k"):
        put(key, 1)
    with shell.running("--lazy", "a/", "--lazy", "b/", "relay", *options(redis)) as relay:
        relay.until("entries 1 ")
        assert relay.signalled(signal.SIGTERM) == 0
    with shell.running("--lazy", "a/", "relay", *options(redis), "--lazy", "b/") as relay:
        relay.until("refilled: revision 3, entries 2 (it left out a/, b/: other prefixes than this relay's)")
    done = shell.run("relay", *options(redis), "--lazy", "a")
    assert (done.code, done.out) == (2, "")


def test_a_client_that_stands_for_election_does_not_feed_beside_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/config.db"
    with (
        redis_server() as redis,
        ConfigClient(url, mirror=f"redis://127.0.0.1:{redis.port}/0") as client,
        pytest.raises(SettingsError, match="already"),
    ):
        client.feed(lambda event, fields: None)
