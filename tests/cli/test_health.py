"""`status` with a mirror, and a mirror beside the verbs that need none."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from tests.cli.conftest import Running, Shell
from tests.support.etcd_servers import etcd
from tests.support.redis_servers import RedisServer, redis_server
from veltrix_mw.cli import health
from veltrix_mw.stores import tiers

Put = Callable[[str, Any], int]

ENTRIES: Final = "veltrix:{default}:entries"


def mirror_url(server: RedisServer, login: str = "") -> str:
    return f"redis://{login}127.0.0.1:{server.port}/0"


@contextmanager
def fed(shell: Shell, server: RedisServer, *arguments: str) -> Iterator[Running]:
    """The mirror, while a relay feeds it."""
    with shell.running("--mirror", mirror_url(server), "relay", *arguments) as relay:
        relay.until("refilled")
        yield relay


def prove(server: RedisServer, ago_s: int) -> None:
    """Let the relay have asked the authority so long ago."""
    seconds, microseconds = server.run("TIME")
    server.run("HSET", ENTRIES, "#proved", (int(seconds) - ago_s) * 1_000_000 + int(microseconds))


def test_a_mirror_that_is_fed_is_told_with_its_relay(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    with fed(shell, redis, "--instance", "feeder"):
        put("k", 2)
        done = shell.run("status", "--json", "--mirror", mirror_url(redis))
        text = shell.ok("--mirror", mirror_url(redis), "status")
    assert (done.code, done.err) == (0, "")
    assert (done.json["relay"], done.json["relay_missing"]) == ("feeder", "")
    authority, mirror = done.json["tiers"]
    assert (authority["role"], authority["state"], authority["revision"]) == ("authority", "reachable", 2)
    assert (mirror["role"], mirror["name"], mirror["url"]) == ("mirror", "redis", mirror_url(redis))
    assert (mirror["state"], mirror["revision"], mirror["lag"], mirror["error"]) == ("reachable", 2, 0, "")
    assert 0 <= mirror["age_s"] <= health.STALE_AFTER_S
    assert mirror["answered_in_s"] > 0
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if "\t" not in line)
    assert lines["mirror"] == "reachable"
    assert lines["mirrored"] == "revision 2, 0 revisions behind"
    assert lines["relay"] == "feeder"
    assert lines["proved"].endswith("then the relay found nothing newer at the authority")


def test_what_a_mirror_leaves_out_is_told(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("tenants/acme/limit", 1)
    put("k", 1)
    with fed(shell, redis, "--lazy", "tenants/"):
        assert redis.run("HEXISTS", ENTRIES, "k") == 1
        assert redis.run("HEXISTS", ENTRIES, "tenants/acme/limit") == 0
        arguments = ("status", "--mirror", mirror_url(redis))
        assert shell.run(*arguments, "--json").json["tiers"][1]["lazy"] == ["tenants/"]
        assert "left out     tenants/\n" in shell.ok(*arguments)


def state_of(shell: Shell, mirror: str) -> dict[str, Any]:
    """The mirror's tier in an answer that is told to be a warning, and no failure."""
    done = shell.run("status", "--json", "--mirror", mirror)
    assert done.code == 0, done
    told = done.json["tiers"][1]
    assert done.err.startswith(f"warning: the mirror is {told['state']}, and workers follow the authority meanwhile: ")
    assert len(done.err.splitlines()) == 1
    assert shell.run("status", "--mirror", mirror).code == 0
    return {**told, **{name: done.json[name] for name in ("relay", "relay_missing")}}


def test_an_empty_mirror_is_told_with_what_to_run(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    told = state_of(shell, mirror_url(redis))
    assert (told["state"], told["revision"], told["age_s"], told["relay"]) == ("empty", 0, None, None)
    assert "run `veltrix relay`" in told["relay_missing"]
    text = shell.ok("status", "--mirror", mirror_url(redis))
    assert "relay        none, because nobody feeds the mirror; run `veltrix relay`" in text
    assert "mirrored     -\n" in text


def test_a_mirror_that_nobody_feeds_any_more_is_behind_and_then_stale(
    shell: Shell, put: Put, redis: RedisServer
) -> None:
    put("k", 1)
    with fed(shell, redis):
        pass
    put("k", 2)
    prove(redis, ago_s=0)
    told = state_of(shell, mirror_url(redis))
    assert (told["state"], told["revision"], told["lag"], told["relay"]) == ("behind", 1, 1, None)
    prove(redis, ago_s=60)
    told = state_of(shell, mirror_url(redis))
    assert (told["state"], told["lag"]) == ("stale", 1)
    assert told["age_s"] >= 60
    assert "last asked the authority 6" in told["error"]


def test_a_mirror_of_another_incarnation_is_behind_by_no_number(shell: Shell, put: Put, redis: RedisServer) -> None:
    put("k", 1)
    with fed(shell, redis):
        pass
    redis.run("HSET", ENTRIES, "#incarnation", "another")
    prove(redis, ago_s=0)
    told = state_of(shell, mirror_url(redis))
    assert (told["state"], told["lag"]) == ("behind", None)
    assert "another incarnation" in told["error"]


def test_a_mirror_that_is_away_is_a_warning(shell: Shell, put: Put, free_port: int) -> None:
    put("k", 1)
    told = state_of(shell, f"redis://127.0.0.1:{free_port}/0")
    assert (told["state"], told["answered_in_s"], told["lag"]) == ("unreachable", None, None)
    assert (told["relay"], told["relay_missing"]) == (None, "the mirror cannot be asked")
    assert "mirrored     -\n" in shell.ok("status", "--mirror", f"redis://127.0.0.1:{free_port}/0")


def test_a_mirror_whose_sentinels_alone_are_away_is_not_found_and_not_said_to_be_left(
    shell: Shell, put: Put, free_port: int
) -> None:
    put("k", 1)
    url = f"redis+sentinel://127.0.0.1:{free_port}/mymaster/0"
    done = shell.run("status", "--json", "--mirror", url)
    told = done.json["tiers"][1]
    assert (told["state"], told["answered_in_s"], told["lag"]) == ("not found", None, None)
    assert (done.json["relay"], done.json["relay_missing"]) == (None, "the mirror cannot be asked")
    assert "none of the sentinels (1) says where 'mymaster' is" in told["error"]
    warned = shell.run("status", "--mirror", url)
    assert warned.code == 0
    assert "warning: the mirror is not found, and only workers that knew its server before may follow it" in warned.err
    assert "workers follow the authority" not in warned.err


def test_an_authority_that_is_away_is_the_exit_code_and_the_mirror_is_told(
    shell: Shell, put: Put, redis: RedisServer
) -> None:
    put("k", 1)
    with fed(shell, redis):
        elsewhere = ("--url", f"sqlite:///{shell.folder}/none.db", "--mirror", mirror_url(redis))
        done = shell.run("status", "--json", *elsewhere)
        assert done.code == 5
        assert done.error["type"] == "NeverWritten"
        authority, mirror = done.json["tiers"]
        assert (authority["state"], mirror["state"]) == ("never written", "reachable")
        assert (mirror["revision"], mirror["lag"]) == (1, None)
        assert "mirrored   revision 1\n" in shell.run("status", *elsewhere).out


def test_the_url_of_a_mirror_is_shown_without_its_secret(shell: Shell, put: Put) -> None:
    put("k", 1)
    with redis_server("--requirepass", "s3cret") as server:
        right = shell.run("status", "--json", "--mirror", mirror_url(server, ":s3cret@"))
        assert right.json["tiers"][1]["state"] == "empty"
        wrong = shell.run("status", "--json", "--mirror", mirror_url(server, ":wr0ng@"))
        assert wrong.json["tiers"][1]["state"] == "unreachable"
    for done in (right, wrong):
        assert done.json["tiers"][1]["url"] == mirror_url(server)
        assert "s3cret" not in done.out + done.err
        assert "wr0ng" not in done.out + done.err


def test_the_environment_names_the_mirror_and_an_empty_option_names_none(
    shell: Shell, put: Put, redis: RedisServer
) -> None:
    put("k", 1)
    assert len(shell.run("status", "--json").json["tiers"]) == 1
    shell.environ["VELTRIX_MIRROR_URL"] = mirror_url(redis)
    assert len(shell.run("status", "--json").json["tiers"]) == 2
    assert len(shell.run("status", "--json", "--mirror", "").json["tiers"]) == 1
    assert len(shell.run("--mirror", "", "status", "--json", "--mirror", mirror_url(redis)).json["tiers"]) == 2


def test_a_mirror_named_wrongly_is_told_by_the_verbs_that_need_it_alone(shell: Shell, put: Put) -> None:
    put("k", 1)
    for mirror in ("redis:/x", "sqlite:///m.db"):
        for verb in ("status", "relay", "watch"):
            done = shell.run(verb, "--mirror", mirror, "--json")
            assert (done.code, done.error["type"]) == (2, "SettingsError"), (verb, mirror)
        assert shell.ok("get", "k", "--mirror", mirror) == "1"


def test_verbs_that_need_no_mirror_do_not_ask_it(shell: Shell, put: Put) -> None:
    put("k", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        silent.settimeout(0)
        mirror = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        for verb in (
            ["get", "k"],
            ["list"],
            ["put", "k", "2"],
            ["history", "k"],
            ["export"],
            ["rollback", "1", "--yes"],
            ["delete", "k"],
        ):
            assert shell.run(*verb, "--mirror", mirror).code == 0, verb
        with pytest.raises(BlockingIOError):
            silent.accept()
        assert shell.run("status", "--mirror", mirror).code == 0
        silent.accept()[0].close()  # `status` asked: a connection would have been seen


def test_a_mirror_is_stale_for_status_when_it_is_for_workers() -> None:
    assert health.STALE_AFTER_S == tiers.STALE_AFTER_S


def test_keys_of_another_shape_in_etcd_are_counted_and_named(shell: Shell, redis: RedisServer) -> None:
    with etcd() as cluster:
        host, port = cluster.hosts[0]
        shell.store = f"etcd://{host}:{port}/default"
        cluster.put("default/checkout/max_items", "80")
        cluster.put("default/no key", "1")
        with fed(shell, redis):
            answer = shell.run("status", "--json", "--mirror", mirror_url(redis)).json
            text = shell.ok("status", "--mirror", mirror_url(redis))
    assert answer["entries"] == 1
    assert answer["ignored"]["count"] == 1
    assert [tier["state"] for tier in answer["tiers"]] == ["reachable", "reachable"]
    assert "ignored      1, whose keys have another shape, as " in text
    assert "no key" in text
