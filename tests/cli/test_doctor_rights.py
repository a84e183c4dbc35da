"""`doctor` and permissions: each command and key that a role needs is missed by its name, and nothing is written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import pytest

from tests.cli.conftest import Shell
from tests.cli.test_doctor import (
    BASE,
    NAMESPACE,
    Report,
    etcd_url,
    examined,
    fed,
    mirror_url,
    redis_url,
    refused,
    write,
)
from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import RedisServer, redis_server
from tests.test_permissions import commands, granted
from veltrix_mw.stores.redis_layout import Names
from veltrix_mw.stores.redis_rights import (
    Trial,
    asking_units,
    reading,
    reading_units,
    relaying,
    relaying_units,
    writing,
)

NAMES: Final = Names(NAMESPACE)
LAZY: Final = ("--lazy", "tenants/")
READING: Final = {"time", "exists", "hmget", "hscan", "xrange", "xread"}


def named(*trials: Iterable[Trial]) -> set[str]:
    return {str(trial.words[0]).lower() for some in trials for trial in some}


WRITES: Final = sorted(named(writing(NAMES)) - READING)
RELAYS: Final = sorted(named(relaying(NAMES)) - READING)


def make_users(server: RedisServer) -> None:
    """Those of the page, but for the last two commands: an administrator, and nobody without a password."""
    for command in commands("redis-cli")[:-2]:
        server.run(*command)


def login(who: str) -> str:
    return f"shop-{who}:{who}-password@"


def untouched(server: RedisServer, look: Callable[[], Report]) -> Report:
    before = server.run("DEBUG", "DIGEST")
    report = look()
    assert server.run("DEBUG", "DIGEST") == before
    return report


def mend(server: RedisServer, text: str) -> None:
    """Run the command that the text ends with."""
    found = re.search(r"redis-cli (ACL SETUSER .*)$", text)
    assert found is not None, text
    server.run(*shlex.split(found[1]))


def test_the_commands_that_are_tried_are_those_that_are_documented() -> None:
    pushed = {"rpush"}
    assert named(reading(NAMES)) == READING
    units = named(reading_units(NAMES, of_mirror=True), asking_units(NAMES)) | pushed
    assert granted("shop-worker") == READING | {"get"} | units
    assert granted("shop-relay") == READING | named(relaying(NAMES), relaying_units(NAMES)) | pushed
    assert granted("shop-writer") == READING | {"get"} | named(writing(NAMES))
    assert named(reading_units(NAMES, of_mirror=False)) - READING == {"zrangebylex", "xrevrange"}


@pytest.mark.parametrize("lost", sorted(READING))
def test_a_command_that_a_follower_lacks_is_named(shell: Shell, redis: RedisServer, lost: str) -> None:
    make_users(redis)
    write(redis_url(redis))
    shell.store = redis_url(redis, login=login("worker"))
    redis.run("ACL", "SETUSER", "shop-worker", f"-{lost}")
    report = untouched(redis, lambda: examined(shell))
    assert ("authority", "read") in report.failed
    told = report.text("authority", "read")
    assert told == f"user 'shop-worker' may not follow: redis-cli ACL SETUSER shop-worker +{lost}"
    mend(redis, report.text("authority", "read"))
    assert examined(shell).failed == []


@pytest.mark.parametrize(
    ("role", "lost"), [*(("writer", each) for each in WRITES), *(("relay", each) for each in RELAYS)]
)
def test_a_command_that_a_writer_or_a_relay_lacks_is_named(
    shell: Shell, redis: RedisServer, role: str, lost: str
) -> None:
    make_users(redis)
    user = f"shop-{role}"
    if role == "writer":
        part, arguments = "authority", tuple[str, ...]()
        write(redis_url(redis))
        shell.store = redis_url(redis, login=login(role))
    else:
        part, arguments = "mirror", ("--mirror", mirror_url(redis, login=login(role)))
        shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
    redis.run("ACL", "SETUSER", user, f"-{lost}")
    report = untouched(redis, lambda: examined(shell, *arguments))
    check = "bookkeeping" if lost == "get" else "write"  # a mirror's lease is read by all
    assert (part, check) in report.failed
    assert f"+{lost}" in report.text(part, check)
    text = report.text(part, "write")
    assert f"user '{user}' may do a part of what a {role} does" in text
    assert text.endswith(f"redis-cli ACL SETUSER {user} +{lost}")
    mend(redis, text)
    report = untouched(redis, lambda: examined(shell, *arguments))
    assert report.state(part, "write") == "ok"
    assert report.failed == []


@pytest.mark.parametrize("role", ["writer", "relay"])
def test_a_key_that_a_writer_or_a_relay_lacks_is_named(shell: Shell, redis: RedisServer, role: str) -> None:
    make_users(redis)
    user = f"shop-{role}"
    if role == "writer":
        part, arguments = "authority", tuple[str, ...]()
        shell.store = redis_url(redis, login=login(role))
        lacked = f"'~{BASE}keys'"
    else:
        part, arguments = "mirror", ("--mirror", mirror_url(redis, login=login(role)))
        shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
        lacked = f"'~{BASE}*'"
    given = (f"~{BASE}entries", f"~{BASE}changes", f"%R~{BASE}lease")
    redis.run("ACL", "SETUSER", user, "resetkeys", *given)
    report = untouched(redis, lambda: examined(shell, *arguments))
    refused(report, part, "write", f"redis-cli ACL SETUSER {user} {lacked}")
    mend(redis, report.text(part, "write"))
    assert examined(shell, *arguments).state(part, "write") == "ok"


def test_a_command_that_the_server_does_not_know_is_a_failure(shell: Shell) -> None:
    with redis_server("--rename-command", "ZREM", "") as server:
        shell.store = redis_url(server)
        refused(examined(shell), "authority", "write", "does not know ZREM: ")


def test_a_worker_is_told_what_a_relay_would_need(shell: Shell, redis: RedisServer) -> None:
    make_users(redis)
    shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
    report = examined(shell, "--mirror", mirror_url(redis, login=login("worker")))
    assert report.state("mirror", "write") == "warn"
    assert "right for a worker, not for a relay" in report.text("mirror", "write")
    mend(redis, report.text("mirror", "write"))
    assert examined(shell, "--mirror", mirror_url(redis, login=login("worker"))).state("mirror", "write") == "ok"


@pytest.mark.parametrize("lost", ["hgetall", "xrevrange", "rpush", "ltrim", "pexpire"])
def test_what_a_worker_lacks_to_read_lazy_units_is_named(shell: Shell, redis: RedisServer, lost: str) -> None:
    make_users(redis)
    shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
    mirror = ("--mirror", mirror_url(redis, login=login("worker")))
    assert examined(shell, *mirror, *LAZY).state("mirror", "lazy") == "ok"
    assert ("mirror", "lazy") not in examined(shell, *mirror).checks
    redis.run("ACL", "SETUSER", "shop-worker", f"-{lost}")
    report = untouched(redis, lambda: examined(shell, *mirror, *LAZY))
    assert report.state("mirror", "lazy") == "warn"
    assert report.text("mirror", "lazy").endswith(f"redis-cli ACL SETUSER shop-worker +{lost}")
    mend(redis, report.text("mirror", "lazy"))
    assert examined(shell, *mirror, *LAZY).state("mirror", "lazy") == "ok"


def test_a_queue_that_a_worker_may_not_push_to_is_named(shell: Shell, redis: RedisServer) -> None:
    make_users(redis)
    shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
    mirror = ("--mirror", mirror_url(redis, login=login("worker")))
    redis.run("ACL", "SETUSER", "shop-worker", "resetkeys", f"%R~{BASE}*")
    report = untouched(redis, lambda: examined(shell, *mirror, *LAZY))
    assert "may not ask the relay for lazy units" in report.text("mirror", "lazy")
    assert report.text("mirror", "lazy").endswith(f"redis-cli ACL SETUSER shop-worker '%RW~{BASE}wanted'")


@pytest.mark.parametrize("lost", ["hgetall", "rpush", "ltrim", "blpop", "lrange"])
@pytest.mark.parametrize("keys", [f"~{BASE}*", "~*"])
def test_what_a_relay_lacks_to_fill_lazy_units_is_named(shell: Shell, redis: RedisServer, lost: str, keys: str) -> None:
    make_users(redis)
    shell.store = f"sqlite:///{shell.folder}/c.db?namespace={NAMESPACE}"
    mirror = ("--mirror", mirror_url(redis, login=login("relay")))
    redis.run("ACL", "SETUSER", "shop-relay", "resetkeys", keys, f"-{lost}")
    report = untouched(redis, lambda: examined(shell, *mirror, *LAZY))
    assert report.state("mirror", "lazy") == "warn"
    assert "as a relay, user 'shop-relay' cannot fill lazy units" in report.text("mirror", "lazy")
    assert report.text("mirror", "lazy").endswith(f"redis-cli ACL SETUSER shop-relay +{lost}")
    mend(redis, report.text("mirror", "lazy"))
    assert examined(shell, *mirror, *LAZY).state("mirror", "lazy") == "ok"


def test_lazy_units_of_an_authority_need_its_index(shell: Shell, redis: RedisServer) -> None:
    make_users(redis)
    write(redis_url(redis))
    shell.store = redis_url(redis, login=login("worker"))
    report = examined(shell, *LAZY)
    refused(report, "authority", "lazy", "redis-cli ACL SETUSER shop-worker +zrangebylex")
    mend(redis, report.text("authority", "lazy"))
    assert examined(shell, *LAZY).failed == []
    shell.store = redis_url(redis, login=login("writer"))
    assert "right for a writer, not for a worker" in examined(shell, *LAZY).text("authority", "lazy")
    shell.store = redis_url(redis, login=login("worker"))
    redis.run("DEL", f"{BASE}keys")
    refused(examined(shell, *LAZY), "authority", "lazy", f"the key {BASE}keys is gone")


def test_a_mirror_that_holds_what_is_lazy_here_is_a_warning(
    shell: Shell, put: Callable[[str, Any], int], redis: RedisServer
) -> None:
    put("k", 1)
    with fed(shell, mirror_url(redis)):
        report = examined(shell, "--mirror", mirror_url(redis), *LAZY)
    assert report.warned == [("mirror", "coverage")]
    assert "it holds tenants/ itself" in report.text("mirror", "coverage")


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdCluster]:
    """An etcd with users, each of which may write something else."""
    with etcd(options=["--bcrypt-cost=4"]) as running:
        write(etcd_url(running))
        running.turn_auth_on(writer="pw", half="pw", relay="pw", worker="pw")
        for role in ("half", "relay", "worker"):
            running.grant(role, f"{NAMESPACE}/", f".veltrix/{NAMESPACE}/", access="read")
        running.grant("half", f"{NAMESPACE}/")
        running.grant("writer", f"{NAMESPACE}/", f".veltrix/{NAMESPACE}/")
        running.ctl("role", "grant-permission", "relay", "readwrite", f".veltrix/{NAMESPACE}/incarnation")
        yield running


@pytest.mark.parametrize("transport", ["gateway", "grpc"])
@pytest.mark.parametrize(
    ("who", "state", "text"),
    [
        ("writer", "ok", "this is permitted"),
        ("half", "fail", "user 'half' may write 'shop/' and not '.veltrix/shop/change', '.veltrix/shop/incarnation'"),
        ("relay", "warn", "may not write 'shop/', '.veltrix/shop/change': right for a relay"),
        ("worker", "warn", "'.veltrix/shop/incarnation': right for a worker"),
    ],
)
def test_what_a_user_of_etcd_may_write_is_told_by_role(
    shell: Shell, guarded: EtcdCluster, transport: str, who: str, state: str, text: str
) -> None:
    shell.store = etcd_url(guarded, login=f"{who}:pw@", query=f"transport={transport}")
    before = guarded.revision()
    report = examined(shell)
    assert guarded.revision() == before
    assert report.state("authority", "write") == state
    assert text in report.text("authority", "write")
    if who == "half":
        assert report.failed == [("authority", "write")]
        assert "--prefix=true readwrite '.veltrix/shop/'" in report.text("authority", "write")
        assert shell.run("put", "a", "1").code == 6
