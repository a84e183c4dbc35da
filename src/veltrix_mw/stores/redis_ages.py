"""How old a mirror's proof is, by this process's clock as well as by Redis's.

Owns what this process saw of proofs, and when; asks nothing. Holds no lock, which a fork could find taken: what was
seen is replaced whole.

The relay notes when it asked the authority by the clock of the Redis that it writes to, and a reader subtracts that
from the clock of the Redis that it reads. After a failover these are the clocks of two machines, and one can be set
while it runs. So a proof that was seen before is never younger than the time that has passed here since, and one that
another machine noted does not count until that one's relay has noted a newer one.
"""

from __future__ import annotations

from dataclasses import dataclass

from veltrix_mw.settings import Host

__all__ = ["Ages"]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A proof as Redis's clock has it, and the earliest that it can be of by ours, monotonic."""

    host: Host
    proof: int
    proved_s: float
    carried: int | None = None  # the proof that was there when the server had just become another one


class Ages:
    """The ages that one process tells of a mirror's proofs. Thread-safe."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def age(self, host: Host, proof: int | None, told_s: float, asked_s: float) -> float:
        """The age to go by of `proof`, which is `told_s` old by the clock of `host`, asked at `asked_s`, monotonic."""
        if proof is None:
            return told_s
        seen, since_s = self._seen, asked_s - told_s
        if seen is None:
            seen = _Seen(host, proof, since_s)
        elif host != seen.host:
            seen = _Seen(host, seen.proof, seen.proved_s, carried=proof)
        elif proof == seen.proof:
            seen = _Seen(host, proof, min(seen.proved_s, since_s), seen.carried)
        elif proof != seen.carried:
            seen = _Seen(host, proof, since_s)
        self._seen = seen
        return max(told_s, asked_s - seen.proved_s)
