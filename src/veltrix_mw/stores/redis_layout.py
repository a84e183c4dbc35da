"""The layout of a namespace in Redis: its keys, what they hold, and the scripts that change them.

Owns names, encodings and the Lua texts, for an authority and a mirror alike; docs/redis-layout.md says the same for
people. Pure: knows no connection, and decodes no value.

A script either changes everything it has to or nothing. Redis undoes nothing of a script that fails half-way, so each
checks first, and makes the one write that may fail (`XADD`) before all others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Any, Final

from veltrix_mw.keys import is_key, unit_of
from veltrix_mw.protocols import Batch, ChangeRecord, Lease, MirrorState, Position, RawChange
from veltrix_mw.stores.units import MAX_UNIT_KEYS
from veltrix_mw.values import MISSING, Missing

__all__ = [
    "APPEND",
    "AUTHORITY",
    "COMMIT",
    "ELECT",
    "FILL",
    "FILL_UNITS",
    "GRANT",
    "KEEP",
    "MAX_CHANGES",
    "META_FIELDS",
    "MIRROR",
    "PROVE",
    "RENEW",
    "RENEW_LEASE",
    "RESIGN",
    "Meta",
    "Names",
    "NotOurs",
    "Script",
    "StreamEntry",
    "TAKE",
    "age_of",
    "append_arguments",
    "encode_record",
    "held_as",
    "meta_of",
    "milliseconds",
    "pairs_of",
    "state_of",
    "stored_of",
    "stream_entry_of",
    "stream_id",
]

FORMAT: Final = b"1"
AUTHORITY: Final = b"authority"
MIRROR: Final = b"mirror"

MAX_CHANGES: Final = 3_000
"""Changes that one stream entry holds: Lua passes a command fewer than 8,000 words, and a change takes two."""


class NotOurs(ValueError):
    """Something in the namespace that this library did not write; `what` names it, and never holds a value."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Names:
    """The keys of one namespace.

    The braces make the namespace's name the hash tag, so that a Redis Cluster keeps them all on one node.
    """

    def __init__(self, namespace: str) -> None:
        self.base = f"veltrix:{{{namespace}}}:"
        self.entries = f"{self.base}entries"
        self.changes = f"{self.base}changes"
        self.keys = f"{self.base}keys"
        self.lease = f"{self.base}lease"
        self.token = f"{self.base}token"
        self.wanted = f"{self.base}wanted"
        self.filled = f"{self.base}filled"

    def lease_of(self, name: str) -> str:
        """Where the lease of that name is; the relay's own is `lease`."""
        return f"{self.base}lease:{name}"

    def token_of(self, name: str) -> str:
        """The last fencing token of the lease of that name."""
        return f"{self.base}token:{name}"

    def unit(self, name: str) -> str:
        """Where the lazy unit of that name is."""
        return f"{self.base}unit:{name}"

    def filling(self, token: int) -> str:
        """Where the relay of that fencing token prepares what will replace the entries."""
        return f"{self.base}filling:{token}"


def held_as(lease: Lease) -> str:
    """The lease as it stands in Redis."""
    return f"{lease.token} {lease.holder}"


def milliseconds(ttl_s: float) -> int:
    """A time to live, as Redis takes it."""
    return max(1, round(ttl_s * 1000))


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name Redis knows it by: its SHA-1."""

    text: str

    @property
    def sha(self) -> str:
        return sha1(self.text.encode(), usedforsecurity=False).hexdigest()


# Meta: what the entries' hash says of itself, in fields that no key can be called.

META_FIELDS: Final = (
    "#format",
    "#kind",
    "#incarnation",
    "#revision",
    "#mark",
    "#count",
    "#digest",
    "#lazy",
    "#proved",
    "#token",
    "#units",
)


@dataclass(frozen=True, slots=True)
class Meta:
    """Where a namespace stands. `digest`, `lazy`, `proved_us`, `token` and `units` are a mirror's.

    `units` names the fill since which units are kept current: a unit of another one is none.
    """

    kind: bytes
    position: Position
    count: int
    digest: int = 0
    lazy: tuple[str, ...] = ()
    proved_us: int | None = None
    token: int = 0
    units: bytes = b""

    @property
    def revision(self) -> int:
        return self.position.revision


def meta_of(values: Sequence[bytes | None]) -> Meta | None:
    """The meta in the values of `META_FIELDS`; None where the hash has none."""
    form, kind, incarnation, revision, mark, count, digest, lazy, proved, token, units = values
    if form is None:
        return None
    if form != FORMAT:
        raise NotOurs("field '#format' of another version of this library, or of none")
    try:
        return Meta(
            kind or b"",
            Position((incarnation or b"").decode(), int(revision or b""), (mark or b"").decode()),
            int(count or b""),
            int(digest or 0),
            tuple((lazy or b"").decode().split()),
            int(proved) if proved else None,
            int(token or 0),
            units or b"",
        )
    except ValueError:
        raise NotOurs("field '#revision', '#count' or another that begins with '#', with a value that") from None


def state_of(meta: Meta | None, now_us: int, lease: bytes | None) -> MirrorState:
    """A mirror's state, `now_us` by the clock that `#proved` is of."""
    relay = "" if lease is None else lease.partition(b" ")[2].decode(errors="replace")
    if meta is None:
        return MirrorState(Position("", 0), relay=relay)
    return MirrorState(meta.position, meta.count, meta.digest, meta.lazy, age_of(meta, now_us), relay)


def age_of(meta: Meta, now_us: int) -> float:
    """How many seconds ago the authority was asked; inf if it never was, or if the clock was set back since."""
    age_s = float("inf") if meta.proved_us is None else (now_us - meta.proved_us) / 1e6
    return age_s if age_s >= 0 else float("inf")


# Entries


def stored_of(field: bytes, raw: bytes) -> tuple[bytes, int]:
    """The value and `mod_revision` in a field of the entries' hash, or of a stream entry."""
    revision, space, value = raw.partition(b" ")
    if not space or not revision.isdigit():
        raise NotOurs(f"field {_shown(field)} whose value does not begin with a revision")
    return value, int(revision)


def pairs_of(reply: Sequence[bytes]) -> list[tuple[str, bytes, int]]:
    """The entries in an HSCAN page of the hash: fields and values in turn. Meta are passed over."""
    found = []
    for at in range(0, len(reply), 2):
        field = reply[at]
        if field.startswith(b"#"):
            continue
        found.append((_key(field), *stored_of(field, reply[at + 1])))
    return found


def _key(field: bytes) -> str:
    key = field.decode("ascii", errors="replace")
    if not is_key(key):
        raise NotOurs(f"field {_shown(field)}, which is no key,")
    return key


def _shown(field: bytes) -> str:
    return repr(field[:80].decode(errors="backslashreplace"))


# The stream of changes


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One revision in the stream.

    `previous` is the position before it, of the incarnation that the entry has. `before` is what an authority's entry
    says of each changed key as it was: value and `mod_revision`, None where it was absent. `relist`: the changes are
    not in here, list instead. `left_out` are the prefixes that a mirror's hash does not have; changes there are.
    """

    position: Position
    previous: int
    previous_mark: str
    changes: tuple[RawChange, ...]
    before: dict[str, tuple[bytes, int] | None]
    record: ChangeRecord
    relist: bool
    size: int
    left_out: tuple[str, ...] = ()

    def batch(self, *, lazy: tuple[str, ...] = (), origin: str = "") -> Batch:
        changes, lazy_changes = self.changes, tuple[RawChange, ...]()
        if lazy:
            lazy_changes = tuple(change for change in changes if change.key.startswith(lazy))
            changes = tuple(change for change in changes if not change.key.startswith(lazy))
        return Batch(self.position, self.previous, changes, self.record, origin, self.left_out, lazy_changes)


def stream_id(revision: int) -> str:
    return f"{revision}-0"


def stream_entry_of(entry_id: bytes, fields: Sequence[bytes]) -> StreamEntry:
    """The stream entry of that id; its fields and values in turn, in any order."""
    revision, _, sequence = entry_id.partition(b"-")
    said: dict[bytes, bytes] = {}
    changes: list[RawChange] = []
    before: dict[str, tuple[bytes, int] | None] = {}
    size = 0
    for at in range(0, len(fields), 2):
        field, value = fields[at], fields[at + 1]
        size += len(value)
        mark = field[:1]
        if mark == b"+":
            changes.append(RawChange(_key(field[1:]), value))
        elif mark == b"-":
            changes.append(RawChange(_key(field[1:]), MISSING))
        elif mark == b"~":
            before[_key(field[1:])] = stored_of(field, value) if value else None
        else:
            said[field] = value
    try:
        if sequence != b"0":
            raise ValueError(entry_id)
        previous, _, previous_mark = said[b"prev"].decode().partition(" ")
        changes.sort(key=lambda change: change.key)
        return StreamEntry(
            Position(said[b"incarnation"].decode(), int(revision), said[b"mark"].decode()),
            int(previous),
            previous_mark,
            tuple(changes),
            before,
            _record(said.get(b"record", b"")),
            b"relist" in said,
            size,
            tuple(said.get(b"lazy", b"").decode().split()),
        )
    except (KeyError, ValueError):
        raise NotOurs(f"stream entry {_shown(entry_id)} that") from None


def encode_record(record: ChangeRecord) -> bytes:
    """A change record as JSON; what is empty is left out."""
    said: dict[str, str | float] = {
        "author": record.author,
        "reason": record.reason,
        "time_s": record.time_s,
        "traceparent": record.traceparent,
    }
    return json.dumps({name: value for name, value in said.items() if value}, separators=(",", ":")).encode()


def _record(raw: bytes) -> ChangeRecord:
    """The record in `raw`; what cannot be read of it is empty: who wrote a change decides nothing."""
    try:
        said: Any = json.loads(raw or b"{}")
    except (ValueError, RecursionError):
        return ChangeRecord()
    if not isinstance(said, dict):
        return ChangeRecord()
    texts = {name: said[name] for name in ("author", "reason", "traceparent") if isinstance(said.get(name), str)}
    time_s = said.get("time_s")
    return ChangeRecord(**texts, time_s=float(time_s) if isinstance(time_s, (int, float)) else 0.0)


# Scripts. Revisions are written as decimal text: Lua's numbers are exact up to 2^53, and lose that in `..`.

COMMIT: Final = Script(
    """-- KEYS entries, changes, keys; ARGV incarnation if none, mark, record, revisions kept; then each operation's
-- key, '+' or '-', value, and expected mod_revision ('' for any)
local entries, changes, keys = KEYS[1], KEYS[2], KEYS[3]
local meta = redis.call('HMGET', entries, '#format', '#kind', '#incarnation', '#revision', '#mark', '#count')
if not meta[1] then
  if redis.call('EXISTS', entries) == 1 then return {'foreign'} end
  if redis.call('EXISTS', changes) == 1 then return {'gone'} end
  meta = {'1', 'authority', ARGV[1], '0', '', '0'}
elseif meta[1] ~= '1' then return {'foreign'}
elseif meta[2] ~= 'authority' then return {'kind'} end
local index = redis.call('TYPE', keys)['ok']
if index ~= 'zset' and index ~= 'none' then return {'index'} end
local revision = string.format('%.0f', tonumber(meta[4]) + 1)
local count = tonumber(meta[6])
local said = {'prev', meta[4] .. ' ' .. meta[5], 'incarnation', meta[3], 'mark', ARGV[2], 'record', ARGV[3]}
local put, gone, new = {}, {}, {}
for at = 5, #ARGV, 4 do
  local key, kind, value, expected = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local now = redis.call('HGET', entries, key)
  local mod = '0'
  if now then
    mod = string.match(now, '^(%d+) ')
    if not mod then return {'foreign', key} end
  end
  if (expected ~= '' and expected ~= mod) or (kind == '-' and not now) then
    return {'conflict', (at - 5) / 4, now or ''}
  end
  said[#said + 1] = kind .. key
  said[#said + 1] = value
  said[#said + 1] = '~' .. key
  said[#said + 1] = now or ''
  if kind == '-' then
    gone[#gone + 1] = key
    count = count - 1
  else
    put[#put + 1] = key
    put[#put + 1] = revision .. ' ' .. value
    if not now then
      count = count + 1
      new[#new + 1] = '0'
      new[#new + 1] = key
    end
  end
end
if index == 'none' and tonumber(meta[6]) > 0 then -- evicted, say: of all that is there
  new = {}
  local page = {'0'}
  repeat
    page = redis.call('HSCAN', entries, page[1], 'COUNT', 1000)
    for at = 1, #page[2], 2 do
      if string.sub(page[2][at], 1, 1) ~= '#' then
        new[#new + 1] = '0'
        new[#new + 1] = page[2][at]
      end
    end
  until page[1] == '0'
  for at = 1, #put, 2 do
    new[#new + 1] = '0'
    new[#new + 1] = put[at]
  end
end
local added = redis.pcall('XADD', changes, 'MAXLEN', ARGV[4], revision .. '-0', unpack(said))
if type(added) == 'table' and added.err then
  if string.find(added.err, 'ID specified', 1, true) then return {'ahead'} end
  return added
end
for from = 1, #put, 2000 do redis.call('HSET', entries, unpack(put, from, math.min(from + 1999, #put))) end
for from = 1, #new, 2000 do redis.call('ZADD', keys, unpack(new, from, math.min(from + 1999, #new))) end
if #gone > 0 then
  redis.call('HDEL', entries, unpack(gone))
  redis.call('ZREM', keys, unpack(gone))
end
redis.call('HSET', entries, '#format', '1', '#kind', 'authority', '#incarnation', meta[3], '#revision', revision,
  '#mark', ARGV[2], '#count', string.format('%.0f', count))
return {'ok', revision, meta[3]}
"""
)

RENEW: Final = Script(
    """-- KEYS entries, changes; ARGV the incarnation known, the one to replace it
local meta = redis.call('HMGET', KEYS[1], '#format', '#kind', '#incarnation')
if not meta[1] then
  if redis.call('EXISTS', KEYS[1]) == 1 then return {'foreign'} end
  if redis.call('EXISTS', KEYS[2]) == 1 or ARGV[1] ~= '' then return {'gone'} end
  redis.call('HSET', KEYS[1], '#format', '1', '#kind', 'authority', '#incarnation', ARGV[2], '#revision', '0',
    '#mark', '', '#count', '0')
  return {'ok', ARGV[2]}
end
if meta[1] ~= '1' then return {'foreign'} end
if meta[2] ~= 'authority' then return {'kind'} end
if meta[3] ~= ARGV[1] then return {'ok', meta[3]} end
redis.call('HSET', KEYS[1], '#incarnation', ARGV[2])
return {'ok', ARGV[2]}
"""
)

ELECT: Final = Script(
    """-- KEYS lease, token, entries; ARGV holder, milliseconds
local meta = redis.call('HMGET', KEYS[3], '#format', '#kind', '#token')
if meta[1] and meta[2] ~= 'mirror' then return {'kind'} end
if not meta[1] and redis.call('EXISTS', KEYS[3]) == 1 then return {'foreign'} end
local held = redis.call('GET', KEYS[1])
if held then
  local left = redis.call('PTTL', KEYS[1])
  if left < 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    left = tonumber(ARGV[2])
  end
  return {'held', held, left}
end
-- At least the clock: a Redis that lost counter and meta must not give out a token that somebody still holds.
local now = redis.call('TIME')
local last = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(meta[3] or '0'), now[1] * 1e6 + now[2])
local token = string.format('%.0f', last + 1)
redis.call('SET', KEYS[2], token)
redis.call('SET', KEYS[1], token .. ' ' .. ARGV[1], 'PX', ARGV[2])
return {'ok', token}
"""
)

KEEP: Final = Script(
    f"""-- KEYS lease, entries; ARGV the lease, milliseconds
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {{'lost'}} end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {{'ok', redis.call('HMGET', KEYS[2], {", ".join(repr(name) for name in META_FIELDS)}), redis.call('TIME')}}
"""
)

GRANT: Final = Script(
    """-- KEYS lease, token; ARGV holder, milliseconds
local held = redis.call('GET', KEYS[1])
if held then
  local left = redis.call('PTTL', KEYS[1])
  if left < 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    left = tonumber(ARGV[2])
  end
  local at = string.find(held, ' ', 1, true)
  if at and string.sub(held, at + 1) == ARGV[1] then -- granted already, and the answer was lost
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    return {'ok', string.sub(held, 1, at - 1)}
  end
  return {'held', held, left}
end
-- At least the clock: a Redis that lost the counter must not give out a token that somebody still holds.
local now = redis.call('TIME')
local token = string.format('%.0f', math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), now[1] * 1e6 + now[2]) + 1)
redis.call('SET', KEYS[2], token)
redis.call('SET', KEYS[1], token .. ' ' .. ARGV[1], 'PX', ARGV[2])
return {'ok', token}
"""
)

RENEW_LEASE: Final = Script(
    """-- KEYS lease; ARGV the lease, milliseconds
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {'lost'} end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'ok'}
"""
)

RESIGN: Final = Script(
    """-- KEYS lease; ARGV the lease
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return {'ok'}
"""
)

APPEND: Final = Script(
    f"""-- KEYS entries, changes, lease, then lazy units; ARGV the lease, its token, incarnation, previous revision,
-- revision, mark, record, count, digest, revisions kept, bytes kept, '1' to leave the changes out of the stream, how
-- many changes are eager; then each of those, '+key' or '-key' and value; then each lazy one, which of KEYS it is of,
-- '+key' or '-key', and value
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return {{'lost'}} end
local entries, revision = KEYS[1], ARGV[5]
local meta = redis.call('HMGET', entries, '#format', '#kind', '#incarnation', '#revision', '#mark', '#token', '#bytes',
  '#lazy', '#units')
if meta[1] and meta[2] ~= 'mirror' then return {{'kind'}} end
if meta[1] ~= '1' or meta[3] ~= ARGV[3] or meta[4] ~= ARGV[4] then return {{'elsewhere'}} end
if tonumber(meta[6] or '0') > tonumber(ARGV[2]) then return {{'lost'}} end
local before = meta[7] or '0'
local said = {{'prev', meta[4] .. ' ' .. (meta[5] or ''), 'incarnation', ARGV[3], 'mark', ARGV[6], 'record', ARGV[7],
  'bytes', before}}
if meta[8] and meta[8] ~= '' then
  said[#said + 1] = 'lazy'
  said[#said + 1] = meta[8]
end
local function say(at)
  if ARGV[12] ~= '1' then
    said[#said + 1] = ARGV[at]
    said[#said + 1] = ARGV[at + 1]
  end
end
local put, gone = {{}}, {{}}
local lazy = 14 + 2 * tonumber(ARGV[13])
for at = 14, lazy - 1, 2 do
  local key = string.sub(ARGV[at], 2)
  if string.sub(ARGV[at], 1, 1) == '+' then
    put[#put + 1] = key
    put[#put + 1] = revision .. ' ' .. ARGV[at + 1]
  else
    gone[#gone + 1] = key
  end
  say(at)
end
for at = lazy, #ARGV, 3 do say(at + 1) end
if ARGV[12] == '1' then
  said[#said + 1] = 'relist'
  said[#said + 1] = '1'
end
-- Each entry says how many bytes were written to the stream before it: what is kept from an entry on is a difference.
local total = tonumber(before)
for at = 1, #said do total = total + #said[at] end
local dropped, from = 0, '-'
while total > tonumber(ARGV[11]) do
  local oldest = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 1)[1]
  if not oldest then break end
  local start = 0
  for at = 1, #oldest[2], 2 do
    if oldest[2][at] == 'bytes' then start = tonumber(oldest[2][at + 1]) or 0 end
  end
  if total - start <= tonumber(ARGV[11]) then break end
  dropped = dropped + 1
  from = string.match(oldest[1], '^%d+') .. '-1'
end
local kept, exactly = ARGV[10], '~'
if dropped > 0 then
  kept = math.min(tonumber(kept), redis.call('XLEN', KEYS[2]) + 1 - dropped)
  exactly = '='
end
local added = redis.pcall('XADD', KEYS[2], 'MAXLEN', exactly, kept, revision .. '-0', unpack(said))
if type(added) == 'table' and added.err then
  if string.find(added.err, 'ID specified', 1, true) then return {{'elsewhere'}} end
  return added
end
for from = 1, #put, 2000 do redis.call('HSET', entries, unpack(put, from, math.min(from + 1999, #put))) end
for from = 1, #gone, 2000 do redis.call('HDEL', entries, unpack(gone, from, math.min(from + 1999, #gone))) end
redis.call('HSET', entries, '#revision', revision, '#mark', ARGV[6], '#count', ARGV[8], '#digest', ARGV[9],
  '#token', ARGV[2], '#bytes', string.format('%.0f', total))
-- A unit that is there goes on with the mirror; one that is not is read when it is wanted.
local kept_current = {{}}
for at = lazy, #ARGV, 3 do
  local unit, key = KEYS[tonumber(ARGV[at])], string.sub(ARGV[at + 1], 2)
  if kept_current[unit] == nil then
    local held = redis.call('HMGET', unit, '#unit', '#refused')
    kept_current[unit] = held[1] and not held[2] and string.match(held[1], '^%S+') == meta[9] or false
    if kept_current[unit] then redis.call('HSET', unit, '#unit', meta[9] .. ' ' .. revision) end
  end
  if not kept_current[unit] then
    redis.call('UNLINK', unit)
  elseif string.sub(ARGV[at + 1], 1, 1) == '-' then
    redis.call('HDEL', unit, key)
  else
    redis.call('HSET', unit, key, revision .. ' ' .. ARGV[at + 2])
    if redis.call('HLEN', unit) > {MAX_UNIT_KEYS + 1} then
      kept_current[unit] = false
      redis.call('UNLINK', unit)
    end
  end
end
return {{'ok'}}
"""
)

FILL: Final = Script(
    """-- KEYS what was prepared, entries, changes, lease; ARGV the lease, its token, incarnation, revision, mark,
-- count, digest, lazy prefixes
if redis.call('GET', KEYS[4]) ~= ARGV[1] then return {'lost'} end
local filling, entries, changes = KEYS[1], KEYS[2], KEYS[3]
local meta = redis.call('HMGET', entries, '#format', '#kind', '#incarnation', '#revision', '#token')
if meta[1] then
  if meta[2] ~= 'mirror' then return {'kind'} end
  if tonumber(meta[5] or '0') > tonumber(ARGV[2]) then return {'lost'} end
  if meta[3] == ARGV[3] and tonumber(meta[4]) > tonumber(ARGV[4]) then return {'backwards', meta[4]} end
elseif redis.call('EXISTS', entries) == 1 then return {'foreign'} end
local last = redis.call('XREVRANGE', changes, '+', '-', 'COUNT', 1)[1]
if last then
  local ours = false
  for at = 1, #last[2], 2 do ours = ours or last[2][at] == 'incarnation' end
  if not ours then return {'foreign'} end
end
if redis.call('HLEN', filling) ~= tonumber(ARGV[6]) then return {'torn'} end
redis.call('HSET', filling, '#format', '1', '#kind', 'mirror', '#incarnation', ARGV[3], '#revision', ARGV[4],
  '#mark', ARGV[5], '#count', ARGV[6], '#digest', ARGV[7], '#lazy', ARGV[8], '#token', ARGV[2],
  '#units', ARGV[2] .. '-' .. ARGV[4])
redis.call('PERSIST', filling)
redis.call('RENAME', filling, entries)
redis.call('UNLINK', changes)
if ARGV[4] ~= '0' then
  redis.call('XADD', changes, ARGV[4] .. '-0', 'prev', ARGV[4] .. ' ' .. ARGV[5], 'incarnation', ARGV[3],
    'mark', ARGV[5], 'relist', '1')
end
return {'ok'}
"""
)

FILL_UNITS: Final = Script(
    """-- KEYS entries, filled, lease, then lazy units; ARGV the lease, its token, incarnation, revision, milliseconds,
-- announcements kept, bytes of them kept, the units' names; then for each of KEYS since when it is unchanged, how many
-- words, and those: fields and values in turn
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return {'lost'} end
local meta = redis.call('HMGET', KEYS[1], '#format', '#kind', '#incarnation', '#revision', '#token', '#units')
if meta[1] and meta[2] ~= 'mirror' then return {'kind'} end
if meta[1] ~= '1' or meta[3] ~= ARGV[3] or meta[4] ~= ARGV[4] or not meta[6] then return {'elsewhere'} end
if tonumber(meta[5] or '0') > tonumber(ARGV[2]) then return {'lost'} end
local at = 9
for unit = 4, #KEYS do
  local last = at + 1 + tonumber(ARGV[at + 1])
  redis.call('UNLINK', KEYS[unit])
  redis.call('HSET', KEYS[unit], '#unit', meta[6] .. ' ' .. ARGV[at])
  for from = at + 2, last, 2000 do redis.call('HSET', KEYS[unit], unpack(ARGV, from, math.min(from + 1999, last))) end
  -- one that is absent a sixtieth as long: names that somebody invents must not fill the memory
  redis.call('PEXPIRE', KEYS[unit], ARGV[at + 1] == '0' and math.ceil(ARGV[5] / 60) or ARGV[5])
  at = last + 1
end
-- Each says how many bytes were announced before it, as the entries of changes do; the newest stays in any case.
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local before = last and #last[2][2] + (tonumber(last[2][4] or '0') or 0) or 0
local total, most = before + #ARGV[8], tonumber(ARGV[7])
local dropped, from = 0, '-'
while total > most do
  local oldest = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 1)[1]
  if not oldest or total - (tonumber(oldest[2][4] or '0') or 0) <= most then break end
  dropped = dropped + 1
  local time, number = string.match(oldest[1], '^(%d+)-(%d+)$')
  from = time .. '-' .. string.format('%.0f', number + 1)
end
local kept, exactly = ARGV[6], '~'
if dropped > 0 then
  kept = math.min(tonumber(kept), redis.call('XLEN', KEYS[2]) + 1 - dropped)
  exactly = '='
end
redis.call('XADD', KEYS[2], 'MAXLEN', exactly, kept, '*', 'units', ARGV[8], 'bytes', string.format('%.0f', before))
return {'ok'}
"""
)

TAKE: Final = Script(
    """-- KEYS wanted
local names = redis.call('LRANGE', KEYS[1], 0, -1)
if #names > 0 then redis.call('DEL', KEYS[1]) end
return names
"""
)

PROVE: Final = Script(
    """-- KEYS entries, lease; ARGV the lease, incarnation, revision, mark, microseconds
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return {'lost'} end
local meta = redis.call('HMGET', KEYS[1], '#kind', '#incarnation', '#revision', '#mark')
if meta[1] ~= 'mirror' or meta[2] ~= ARGV[2] or meta[3] ~= ARGV[3] or (ARGV[4] ~= '' and meta[4] ~= ARGV[4]) then
  return {'elsewhere'}
end
redis.call('HSET', KEYS[1], '#proved', ARGV[5])
return {'ok'}
"""
)


def append_arguments(
    batch: Batch, *, lease: str, token: int, count: int, digest: int, keep_revisions: int, keep_bytes: int
) -> tuple[list[str], list[str | bytes]]:
    """What `APPEND` takes to add one revision: the names of the lazy units that it changes, and the arguments."""
    position = batch.position
    arguments: list[str | bytes] = [
        lease,
        str(token),
        position.incarnation,
        str(batch.previous),
        str(position.revision),
        position.fingerprint,
        encode_record(batch.record),
        str(count),
        str(digest),
        str(keep_revisions),
        str(keep_bytes),
        "1" if len(batch.changes) + len(batch.lazy_changes) > MAX_CHANGES else "0",
        str(len(batch.changes)),
    ]
    for change in batch.changes:
        arguments += _words(change)
    units: dict[str, int] = {}
    for change in batch.lazy_changes:
        at = units.setdefault(unit_of(change.key, batch.lazy), len(units) + 4)
        arguments += (str(at), *_words(change))
    return list(units), arguments


def _words(change: RawChange) -> tuple[str, bytes]:
    if isinstance(change.value, Missing):
        return f"-{change.key}", b""
    return f"+{change.key}", change.value
