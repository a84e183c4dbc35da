"""A herd of 2,000 readers in 8 processes, threads and tasks, on etcd and Redis: what it costs them, as they count."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pytest

from tests.herd_worker import Answers, Worker
from tests.support.etcd_servers import EtcdCluster, etcd
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.waiting import wait_until
from tests.test_permissions import commands
from veltrix_mw import AuthFailed, ConfigClient, Put, unit_filler
from veltrix_mw.unit_reader import FILLED_WITHIN_S

WITHIN_S: Final = 60.0  # an end to waiting in vain
PROCESSES: Final = 8
READERS: Final = 250  # in each process
ALL: Final = PROCESSES * READERS
PATIENT_S: Final = 50.0  # how long a relay is waited for where what it costs must not hang on how fast it is
ENTRIES: Final = "veltrix:{shop}:entries"
WANTED: Final = "veltrix:{shop}:wanted"
MANY: Final = [f"tenants/many-{number:04}" for number in range(2_000)]
LOGGING: Final = ("--log-level", "debug", "--bcrypt-cost", "4")  # then etcd logs each request, with its keys


class Asked:
    """What the servers were asked since it was made."""

    def __init__(self, cluster: EtcdCluster, redis: RedisServer) -> None:
        self._cluster = cluster
        self._redis = redis
        self._log_at = len(cluster.members[0].log)
        self._before = self._calls()

    def unit_reads(self) -> list[list[str]]:
        """The requests to etcd that read lazy units, with their names."""
        lines = self._cluster.members[0].log[self._log_at :].splitlines()
        reads = [re.findall(r'request_range:<key:\\"shop/(tenants/[^/"\\]+)\\"', line) for line in lines]
        return [names for names in reads if names]

    def reads_of(self, unit: str) -> int:
        return sum(unit in names for names in self.unit_reads())

    def redis(self, command: str) -> int:
        """How often Redis ran that command, also in scripts."""
        return self._calls()[command] - self._before[command]

    def mirror_reads(self) -> int:
        """The units that workers read there; the relay reads none."""
        return self.redis("hgetall")

    def check_mirror_reads(self) -> None:
        """One or two a process."""
        assert PROCESSES <= self.mirror_reads() <= 2 * PROCESSES

    def _calls(self) -> Counter[str]:
        stats: Any = self._redis.run("INFO", "commandstats")
        return Counter({name.removeprefix("cmdstat_"): said["calls"] for name, said in stats.items()})


class Fleet:
    """Servers, relays and workers of one namespace; `logins` are who they are, at etcd and at Redis."""

    def __init__(
        self, stack: contextlib.ExitStack, cluster: EtcdCluster, redis: RedisServer, **logins: tuple[str, str]
    ) -> None:
        self._stack = stack
        self.etcd = cluster
        self.redis = redis
        self._logins = logins
        self.relays: dict[str, subprocess.Popen[str]] = {}
        self.workers: list[Worker] = []

    def at(self, who: str) -> dict[str, str]:
        """The URLs of authority and mirror."""
        there, here = self._logins.get(who, ("", ""))
        return {
            "url": f"etcd://{there}127.0.0.1:{self.etcd.members[0].port}/shop",
            "mirror": f"redis://{here}127.0.0.1:{self.redis.port}/0",
        }

    def stand(self, name: str) -> None:
        """Begin a process that stands for election, and wait until it leads or stands by."""
        where = self.at("relay")
        command = [sys.executable, "-u", "-m", "veltrix_mw.cli", "--url", where["url"], "--mirror", where["mirror"]]
        command += ["relay", "--lazy", "tenants/", "--instance", name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        self._stack.enter_context(process.stdout)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        self.relays[name] = process
        said = process.stdout.readline()
        assert said.startswith(("elected", "standing by")), said

    def leader(self) -> str:
        """The relay that leads and has filled the mirror, or empty."""
        lease = self.redis.run("GET", "veltrix:{shop}:lease") if self.redis.run("EXISTS", ENTRIES) else None
        return "" if lease is None else str(lease.decode().partition(" ")[2])

    def begin(self, values: Mapping[str, Any]) -> None:
        """Write these values, have a relay lead, and all workers follow the mirror."""
        changes = [Put(key, value) for key, value in values.items()]
        with ConfigClient(self.at("writer")["url"]) as writer:
            for at in range(0, len(changes), 100):
                writer.write(changes[at : at + 100])
        self.stand("first")
        wait_until(lambda: self.leader() == "first", WITHIN_S, reason="the mirror to be filled")
        options = {**self.at("worker"), "lazy": ["tenants/"], "relay": "never", "fetch_timeout_s": WITHIN_S}
        self.workers = [self._stack.enter_context(Worker(**options)) for _ in range(PROCESSES)]
        for worker in self.workers:
            worker.until("ready")

    def asked(self) -> Asked:
        return Asked(self.etcd, self.redis)

    def line_up(self, key: str, *, filled_within_s: float = PATIENT_S) -> None:
        for worker in self.workers:
            worker.line_up([[key]] * READERS, filled_within_s=filled_within_s)
        for worker in self.workers:
            worker.until("set")

    def go(self) -> None:
        for worker in self.workers:
            worker.go()

    def answers(self) -> list[Answers]:
        return [worker.answers() for worker in self.workers]

    def herd(self, key: str) -> list[Answers]:
        self.line_up(key)
        self.go()
        return self.answers()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        fleet = Fleet(stack, stack.enter_context(etcd(options=LOGGING)), stack.enter_context(redis_server()))
        units = {f"tenants/{name}/limit": 500 for name in ("acme", "queue", "after-queue", "read", "after-read")}
        fleet.begin({"eager": 1, **units, **{f"{unit}/limit": number for number, unit in enumerate(MANY)}})
        yield fleet


@pytest.fixture
def least() -> Iterator[Fleet]:
    """Whose workers may not read etcd at all, and at Redis do what docs/permissions.md grants a worker."""
    with contextlib.ExitStack() as stack:
        cluster, redis = stack.enter_context(etcd(options=LOGGING)), stack.enter_context(redis_server())
        cluster.turn_auth_on(relay="relay", nobody="nobody")
        cluster.grant("relay", "shop/", ".veltrix/shop/")
        for command in commands("redis-cli"):
            if command[2] == "shop-worker":
                redis.run(*command)
        worker = "nobody:nobody@", "shop-worker:worker-password@"
        fleet = Fleet(stack, cluster, redis, writer=("root:root@", ""), relay=("relay:relay@", ""), worker=worker)
        fleet.begin({"tenants/acme/limit": 500})
        yield fleet


def every_reader_got(answers: Sequence[Answers], value: str) -> bool:
    faults = sum((each.faults for each in answers), Counter[str]())
    assert not faults, faults
    return sum((each.values for each in answers), Counter[str]()) == {value: ALL}


def metered(cluster: EtcdCluster) -> int:
    """The requests that read or write keys, by etcd's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.members[0].port}/metrics", timeout=WITHIN_S) as answer:
        text = answer.read().decode()
    found = re.findall(r'^grpc_server_handled_total{.*grpc_method="(?:Range|Txn)".*} (\d+)$', text, re.MULTILINE)
    return sum(map(int, found))


def logged(cluster: EtcdCluster) -> int:
    return len(re.findall('"request stats".*"response type":"/etcdserverpb.KV/(?:Range|Txn)"', cluster.members[0].log))


def test_etcd_logs_each_request_that_its_metrics_count(fleet: Fleet) -> None:
    # One may come between two looks.
    wait_until(lambda: logged(fleet.etcd) == metered(fleet.etcd), WITHIN_S, reason="log and metrics to agree")
    assert logged(fleet.etcd) > 20


@pytest.mark.parametrize(("key", "value"), [("tenants/acme/limit", "500"), ("tenants/nobody/limit", '"absent"')])
def test_a_herd_on_a_cold_unit_costs_one_read_of_the_authority_and_two_of_the_mirror_a_process(
    key: str, value: str, fleet: Fleet
) -> None:
    asked = fleet.asked()
    answers = fleet.herd(key)
    assert every_reader_got(answers, value)
    assert asked.unit_reads() == [[key.rpartition("/")[0]]]
    asked.check_mirror_reads()
    assert 1 <= asked.redis("rpush") <= PROCESSES
    assert all(each.units_read["wanted"] <= 1 for each in answers)

    asked = fleet.asked()
    answers = fleet.herd(key)
    assert every_reader_got(answers, value)
    assert [each.units_read for each in answers] == [Counter()] * PROCESSES
    assert asked.unit_reads() == []
    assert asked.redis("rpush") == 0
    assert asked.mirror_reads() == 0


def test_workers_that_may_only_read_the_mirror_and_want(least: Fleet) -> None:
    with ConfigClient(least.at("worker")["url"]) as worker, pytest.raises(AuthFailed):
        worker.list()
    asked = least.asked()
    assert every_reader_got(least.herd("tenants/acme/limit"), "500")
    assert asked.unit_reads() == [["tenants/acme"]]
    asked.check_mirror_reads()
    assert 1 <= asked.redis("rpush") <= PROCESSES


def test_2000_cold_units_cost_the_authority_a_50th_as_many_calls_and_all_servers_a_20th(fleet: Fleet) -> None:
    # Few readers with many units each: how readers come one after the other is the machine's to say.
    parts = [MANY[at : at + 100] for at in range(0, len(MANY), 100)]
    values = [{f"{unit}/limit": int(unit[-4:]) for unit in part} for part in parts]
    asked, worker = fleet.asked(), fleet.workers[0]
    worker.line_up([[*value] for value in values], filled_within_s=PATIENT_S)
    worker.until("set")
    worker.go()
    answers = worker.answers()
    assert not answers.faults
    assert answers.values == Counter(map(json.dumps, values))
    assert answers.units_read == {"mirror": len(MANY), "wanted": len(MANY)}
    reads = asked.unit_reads()
    # On a machine that stalls, what a call had read may come too late, and be read again, once: each call counts.
    times = Counter(unit for units in reads for unit in units)
    assert times.keys() == set(MANY)
    assert max(times.values()) <= 2
    assert times.total() - len(times) <= unit_filler.AT_ONCE
    assert len(reads) <= len(MANY) / 50
    # Each look at the mirror asks for its time. The relay takes names, fills, and its announcement is read.
    calls = asked.redis("time") + asked.redis("rpush") + 3 * asked.redis("xadd")
    assert len(reads) + calls <= len(MANY) / 20


# --- last, as workers leave a mirror that nobody feeds for too long, and come back


@pytest.mark.parametrize("killed", ["queue", "read"])
def test_a_relay_that_is_killed_in_the_middle_costs_a_read_a_process_until_another_leads(
    killed: str, fleet: Fleet
) -> None:
    """With the names in its queue, or once it has taken them and reads."""
    old, new, unit, etcd = fleet.leader(), f"after-{killed}", f"tenants/{killed}", fleet.etcd
    fleet.stand(new)
    asked = fleet.asked()
    fleet.line_up(f"{unit}/limit", filled_within_s=FILLED_WITHIN_S)
    if killed == "queue":
        fleet.relays[old].send_signal(signal.SIGSTOP)
        fleet.go()
        wait_until(lambda: asked.redis("rpush"), WITHIN_S, reason="a name in the queue")
        fleet.relays[old].kill()
    else:
        etcd.pause(etcd.members[0])
        fleet.go()
        # Each asks for one name.
        wait_until(
            lambda: asked.redis("rpush") > fleet.redis.run("LLEN", WANTED), WITHIN_S, reason="a name to be taken"
        )
        fleet.relays[old].kill()
        etcd.resume(etcd.members[0])
    answers = fleet.answers()
    assert every_reader_got(answers, "500")
    wait_until(lambda: fleet.leader() == new, WITHIN_S, reason="the other relay to lead")
    assert asked.redis("set") == 2  # the lease and its token: one election
    assert all(each.units_read["authority"] <= 1 for each in answers)
    # The dead one's, if it came to that, and that of the new one, if the names still wait.
    assert 1 <= asked.reads_of(unit) <= PROCESSES + (2 if killed == "read" else 1)

    asked = fleet.asked()
    assert every_reader_got(fleet.herd(f"tenants/{new}/limit"), "500")
    assert asked.reads_of(f"tenants/{new}") == 1
