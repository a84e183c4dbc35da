"""The rights of a user of Redis: which commands and keys a role needs, and which of them its user lacks.

Owns the list of what each role runs, as docs/permissions.md grants it, and how each command is tried so that it changes
nothing: Redis looks at the permissions first, then refuses the words, or finds nothing to do. Knows no connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from veltrix_mw.stores.redis_layout import Names

__all__ = [
    "Lacking",
    "Trial",
    "asking_units",
    "lacking_of",
    "pushing",
    "reading",
    "reading_units",
    "relaying",
    "relaying_units",
    "writing",
]

_NOBODY: Final = "#never"  # no field or member is called so
_NO_NUMBER: Final = "never"


@dataclass(frozen=True, slots=True)
class Trial:
    """A command as it is tried. `grants` are the key patterns that it needs, in the words of `ACL SETUSER`.

    `marks`: only who writes the entries or their changes may run it.
    """

    words: tuple[str | int, ...]
    grants: tuple[str, ...] = ()
    marks: bool = False


@dataclass(frozen=True, slots=True)
class Lacking:
    """What a user lacks of a role: the words to add, of commands and keys. `is_partial`: it may write in part."""

    words: tuple[str, ...] = ()
    is_partial: bool = False

    def __bool__(self) -> bool:
        return bool(self.words)

    def remedy(self, user: str | None) -> str:
        """What an administrator is to run."""
        quoted = (word if word.startswith("+") else f"'{word}'" for word in self.words)
        return f"redis-cli ACL SETUSER {user or 'default'} {' '.join(quoted)}"


def reading(names: Names, *, follows: bool = False) -> tuple[Trial, ...]:
    """What a follower runs; `follows`: the nodes of a cluster."""
    entries, changes = names.entries, names.changes
    may = (f"%R~{names.base}*",)
    asking = (Trial(("ASKING",)),) if follows else ()
    return (
        Trial(("TIME",)),
        Trial(("EXISTS", entries), may),
        Trial(("HMGET", entries, "#format"), may),
        Trial(("HSCAN", entries, 0, "COUNT", 1), may),
        Trial(("XRANGE", changes, "-", "-", "COUNT", 1), may),
        Trial(("XREAD", "COUNT", 1, "STREAMS", changes, "0"), may),
        *asking,
    )


def writing(names: Names) -> tuple[Trial, ...]:
    """What a writer runs of an authority, by scripts and beside them."""
    entries, changes, keys = (f"~{name}" for name in (names.entries, names.changes, names.keys))
    return (
        *_SCRIPTS,
        Trial(("HGET", names.entries, _NOBODY), (entries,)),
        Trial(("HSET", names.entries, "#a", "1", "#b"), (entries,), marks=True),
        Trial(("HDEL", names.entries, _NOBODY), (entries,)),
        Trial(("XADD", names.changes, "0-0", "never", "written"), (changes,), marks=True),
        Trial(("XREVRANGE", names.changes, "-", "-", "COUNT", 1), (changes,)),
        Trial(("TYPE", names.keys), (keys,)),
        Trial(("ZADD", names.keys, "NX", "XX", 0, _NOBODY), (keys,)),
        Trial(("ZREM", names.keys, _NOBODY), (keys,)),
    )


def relaying(names: Names) -> tuple[Trial, ...]:
    """What a relay runs of a mirror."""
    may = (f"~{names.base}*",)
    absent = names.filling(0)  # no relay has that fencing token
    return (
        *_SCRIPTS,
        Trial(("GET", names.lease), may),
        Trial(("SET", names.lease, "never", "NX", "XX"), may),
        Trial(("DEL", absent), may),
        Trial(("PTTL", names.lease), may),
        Trial(("PEXPIRE", names.lease, _NO_NUMBER), may),
        Trial(("EXPIRE", absent, _NO_NUMBER), may),
        Trial(("PERSIST", absent), may),
        Trial(("UNLINK", absent), may),
        Trial(("RENAME", absent, absent), may),
        Trial(("HSET", names.entries, "#a", "1", "#b"), may, marks=True),
        Trial(("HDEL", names.entries, _NOBODY), may),
        Trial(("HLEN", names.entries), may),
        Trial(("XADD", names.changes, "0-0", "never", "written"), may, marks=True),
        Trial(("XLEN", names.changes), may),
        Trial(("XREVRANGE", names.changes, "-", "-", "COUNT", 1), may),
    )


def relaying_units(names: Names) -> tuple[Trial, ...]:
    """What a relay runs of a mirror's lazy units, beside what `pushing` tries."""
    may = (f"~{names.base}*",)
    return (
        Trial(("HGETALL", names.unit(_NO_NUMBER)), may),
        Trial(("LTRIM", names.wanted, _NO_NUMBER, _NO_NUMBER), may),
        Trial(("BLPOP", names.wanted, _NO_NUMBER), may),
        Trial(("LRANGE", names.wanted, 0, 0), may),
    )


def reading_units(names: Names, *, of_mirror: bool) -> tuple[Trial, ...]:
    """What a worker runs to find lazy units and what becomes of them."""
    may = (f"%R~{names.base}*",)
    if not of_mirror:
        return (
            Trial(("EXISTS", names.keys), may),
            Trial(("ZRANGEBYLEX", names.keys, f"[{_NO_NUMBER}/", f"({_NO_NUMBER}0", "LIMIT", 0, 1), may),
            Trial(("XREVRANGE", names.changes, "-", "-", "COUNT", 1), may),
        )
    return (
        Trial(("HGETALL", names.unit(_NO_NUMBER)), may),
        Trial(("XREVRANGE", names.filled, "-", "-", "COUNT", 1), may),
        Trial(("XREAD", "COUNT", 1, "STREAMS", names.filled, "0"), may),
    )


def asking_units(names: Names) -> tuple[Trial, ...]:
    """What a worker runs to ask the relay for units, beside what `pushing` tries."""
    may = (f"%RW~{names.wanted}",)
    return (
        Trial(("LTRIM", names.wanted, _NO_NUMBER, _NO_NUMBER), may),
        Trial(("PEXPIRE", names.wanted, _NO_NUMBER), may),
    )


def pushing(namespace: str, names: Names) -> tuple[Trial, Callable[[bool], Trial]]:
    """How `RPUSH` is tried, which takes whatever it is given: a trial, and by whether that lacks a key, the next.

    Where nobody may write beside the namespace, it is given a key there. Else a script that says that it writes nothing
    runs it, which Redis 7 then refuses; an older one does not know such scripts, and it is taken as permitted.
    """
    beside = f"veltrix-doctor:{{{namespace}}}"

    def second(is_barred: bool) -> Trial:
        if is_barred:
            return Trial(("RPUSH", beside, "never"))
        return Trial(("EVAL", "#!lua flags=no-writes\nreturn redis.call('RPUSH', KEYS[1], 'never')", 1, names.wanted))

    return Trial(("LTRIM", beside, _NO_NUMBER, _NO_NUMBER)), second


_SCRIPTS: Final = (Trial(("EVAL", "return 1", 0)), Trial(("EVALSHA", "0" * 40, 0)))


def lacking_of(trials: Sequence[Trial], replies: Sequence[Any]) -> Lacking:
    """What is lacking by the replies: each what the user lacks for that trial, as `+hset` or the words of a key; ''
    where nothing.
    """
    words: dict[str, None] = {}
    for trial, lacks in zip(trials, replies, strict=True):
        if lacks.startswith("+"):
            words[lacks] = None
        elif lacks:
            words |= dict.fromkeys(trial.grants)
    marks = [not lacks for trial, lacks in zip(trials, replies, strict=True) if trial.marks]
    # Commands first, as who reads it knows them.
    return Lacking(
        tuple(sorted(words, key=lambda word: not word.startswith("+"))), is_partial=bool(words) and any(marks)
    )
