"""What befalls a cluster: each fault by its name, and a random schedule of them that a seed repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from tests.simulation.cluster import Cluster
from tests.simulation.world import MISSING
from veltrix_mw.values import Missing

KEYS = ["a", "b", "c/d", "c/e"]
MODES = ["refused", "hangs", "deaf", "late"]
SERVERS = ["authority", "mirror"]

Changes = dict[str, bytes | Missing]


def changes_of(random: Random) -> Changes:
    keys = random.sample(KEYS, random.randint(1, 3))
    return {key: random.choice([MISSING, b"%d" % random.randint(0, 9)]) for key in keys}


def write(cluster: Cluster, random: Random) -> None:
    cluster.authority.write(changes_of(random))


def write_a_burst(cluster: Cluster, random: Random) -> None:
    for _ in range(random.randint(2, 8)):
        write(cluster, random)


def write_in_a_moment(cluster: Cluster, random: Random) -> None:
    """While answers are under way."""
    changes = changes_of(random)
    cluster.after(random.uniform(0, 0.5), lambda: cluster.authority.write(changes))


def write_while_an_answer_is_under_way(cluster: Cluster, random: Random) -> None:
    """The authority's next answer is of before it."""
    changes = changes_of(random)
    cluster.meanwhile = lambda: cluster.authority.write(changes)


def delete_without_trace(cluster: Cluster, random: Random) -> None:
    present = sorted(cluster.authority.state)
    if present:
        cluster.authority.delete_without_trace(random.sample(present, 1))


def compact(cluster: Cluster, random: Random) -> None:
    cluster.authority.compact()


def back_up(cluster: Cluster, random: Random) -> None:
    cluster.backups.append(cluster.authority.backup())


def restore(cluster: Cluster, random: Random) -> None:
    """A backup is put back, with the old label, and written on; perhaps beyond the revision there was before."""
    restore_with(cluster, random, random.randint(0, 6))


def restore_with(cluster: Cluster, random: Random, writes: int) -> None:
    cluster.authority.restore(random.choice(cluster.backups[-4:]))
    if random.random() < 0.7:
        cluster.authority_connections += 1
    for _ in range(writes):
        write(cluster, random)


def restore_twice(cluster: Cluster, random: Random) -> None:
    backup = random.choice(cluster.backups[-4:])
    for _ in range(2):
        cluster.authority.restore(backup)
        for _ in range(random.randint(0, 4)):
            write(cluster, random)
        cluster.run(random.uniform(0, 2))


def restore_to_the_same_revision(cluster: Cluster, random: Random) -> None:
    """A backup is put back, and written on up to the very revision that was lost."""
    lost = cluster.authority.revision
    restore_with(cluster, random, 0)
    while cluster.authority.revision < lost:
        write(cluster, random)


def fail_over_the_authority(cluster: Cluster, random: Random) -> None:
    cluster.authority_connections += 1
    for process in cluster.processes:
        cluster.wire(process, "authority").mode = "refused"
    cluster.run(random.uniform(0.2, 2))
    for process in cluster.processes:
        cluster.wire(process, "authority").mode = "up"


def lose_connections(cluster: Cluster, random: Random) -> None:
    if random.random() < 0.5:
        cluster.authority_connections += 1
    else:
        cluster.mirror.connections += 1


def half_open(cluster: Cluster, random: Random) -> None:
    """A process's watch brings nothing more, and does not say so."""
    for store in (each.authority for each in random.sample([*cluster.workers, *cluster.relays], 2)):
        for watch in store.watches:
            watch.is_half_open = True
    for worker in random.sample(cluster.workers, 1):
        inner = getattr(worker.watch, "_watch", None)
        if inner is not None:
            inner.is_half_open = True


def break_a_wire(cluster: Cluster, random: Random) -> None:
    process, server = random.choice(cluster.processes), random.choice(SERVERS)
    cluster.wire(process, server).mode = random.choice(MODES)


def break_a_server(cluster: Cluster, random: Random) -> None:
    server, mode = random.choice(SERVERS), random.choice(MODES)
    for process in cluster.processes:
        cluster.wire(process, server).mode = mode


def slow_a_wire(cluster: Cluster, random: Random) -> None:
    process, server = random.choice(cluster.processes), random.choice(SERVERS)
    cluster.wire(process, server).slow_s = 0.5 if server == "mirror" else 0.02


def mend_wires(cluster: Cluster, random: Random) -> None:
    cluster.wires.clear()


def repeat_messages(cluster: Cluster, random: Random) -> None:
    cluster.repeats = not cluster.repeats


def restart_a_worker(cluster: Cluster, random: Random) -> None:
    random.choice(cluster.workers).restart(random.choice(["saved", "fresh", "forked"]))


def kill_a_relay(cluster: Cluster, random: Random) -> None:
    leaders = [relay for relay in cluster.relays if relay.relay.leads]
    random.choice(leaders or cluster.relays).kill()


def start_relays(cluster: Cluster, random: Random) -> None:
    for relay in cluster.relays:
        relay.start()


def pause_a_relay(cluster: Cluster, random: Random) -> None:
    """It is stopped right before its next step, for longer than its lease: and then takes that step."""
    leaders = [relay for relay in cluster.relays if relay.relay.leads]
    random.choice(leaders or cluster.relays).pause(random.uniform(3, 12))


def pause_a_worker(cluster: Cluster, random: Random) -> None:
    random.choice(cluster.workers).pause(random.uniform(1, 30))


def lose_the_lease(cluster: Cluster, random: Random) -> None:
    cluster.mirror.evict_lease()


def flush_the_mirror(cluster: Cluster, random: Random) -> None:
    cluster.mirror.flush()


def evict_the_hash(cluster: Cluster, random: Random) -> None:
    cluster.mirror.evict_entries()


def evict_the_stream(cluster: Cluster, random: Random) -> None:
    cluster.mirror.evict_stream()


def trim_the_stream(cluster: Cluster, random: Random) -> None:
    cluster.mirror.trim(random.randint(0, 2))


def dump_the_mirror(cluster: Cluster, random: Random) -> None:
    cluster.dumps.append(cluster.mirror.dump())


def put_back_a_dump(cluster: Cluster, random: Random) -> None:
    """Redis restarts with an old dump; or a proxy leads to another server, and who is connected does not notice."""
    cluster.mirror.put_back(random.choice(cluster.dumps[-4:]))
    if random.random() < 0.5:
        cluster.mirror.connections += 1


Fault = Callable[[Cluster, Random], None]

WRITES: list[Fault] = [write, write_a_burst, write_in_a_moment, write_while_an_answer_is_under_way]

FAULTS: list[Fault] = [
    delete_without_trace,
    compact,
    back_up,
    restore,
    restore_twice,
    restore_to_the_same_revision,
    fail_over_the_authority,
    lose_connections,
    half_open,
    break_a_wire,
    break_a_server,
    slow_a_wire,
    *[mend_wires] * 3,
    repeat_messages,
    restart_a_worker,
    kill_a_relay,
    start_relays,
    pause_a_relay,
    pause_a_worker,
    lose_the_lease,
    flush_the_mirror,
    evict_the_hash,
    evict_the_stream,
    trim_the_stream,
    dump_the_mirror,
    put_back_a_dump,
]


def drive(cluster: Cluster, random: Random, *, steps: int, faults: Sequence[Fault] = FAULTS) -> None:
    """A random schedule; then everything heals."""
    cluster.run(random.choice([0, 5]))
    for _ in range(steps):
        happens = random.choice(WRITES if random.random() < 0.4 else faults)
        happens(cluster, random)
        cluster.run(random.choice([0.0, 0.02, 0.3, 2.0, 8.0]) * random.random())
    cluster.settle(without_relays=random.random() < 0.3)


def made(seed: int, **options: object) -> Cluster:
    """A cluster whose processes may, or may not, rename a history that was restored: by the seed."""
    may_write = [(True, True), (True, True), (False, True), (True, False), (False, False)][seed % 5]
    return Cluster(seed=seed, may_write=may_write, **options)  # type: ignore[arg-type]
