"""etcd's messages, as far as the store needs them.

Owns their shapes and the methods that take them, and the JSON that etcd's gateway reads and writes: bytes are base64,
64-bit numbers may be strings, what is empty is left out. Knows nothing of how they travel, nor of what the keys mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

__all__ = [
    "AUTHENTICATE",
    "GRANT_LEASE",
    "KEEP_LEASE",
    "RANGE",
    "STATUS",
    "TRANSACT",
    "Answer",
    "Authenticate",
    "Authenticated",
    "Compare",
    "Event",
    "Header",
    "KeepLease",
    "KeyValue",
    "LeaseAsked",
    "LeaseGranted",
    "LeaseKept",
    "Message",
    "Method",
    "Operation",
    "Put",
    "Range",
    "Ranged",
    "Result",
    "Status",
    "StatusAsked",
    "Transacted",
    "Transaction",
    "WatchAsked",
    "WatchCreate",
    "Watched",
    "decode",
    "encode",
    "encode_creates",
    "prefix_end",
]


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is sent or received."""


# What is asked


class Range(Message, frozen=True):
    """A key, or all keys from `key` to before `range_end`; `revision` 0 is now."""

    key: bytes
    range_end: bytes = b""
    limit: int = 0
    revision: int = 0
    sort_order: Literal["NONE", "DESCEND"] = "NONE"
    sort_target: Literal["KEY", "MOD"] = "KEY"
    keys_only: bool = False
    count_only: bool = False
    min_mod_revision: int = 0
    max_mod_revision: int = 0


class Put(Message, frozen=True):
    """A key's new value; it is deleted when the etcd lease of the number `lease` ends, 0 for never."""

    key: bytes
    value: bytes
    lease: int = 0


class DeleteRange(Message, frozen=True):
    key: bytes


class Operation(Message, frozen=True):
    """One step of a transaction: exactly one of the three."""

    request_range: Range | None = None
    request_put: Put | None = None
    request_delete_range: DeleteRange | None = None

    @classmethod
    def range(cls, asked: Range) -> Operation:
        return cls(request_range=asked)

    @classmethod
    def put(cls, key: bytes, value: bytes, *, lease: int = 0) -> Operation:
        return cls(request_put=Put(key, value, lease))

    @classmethod
    def delete(cls, key: bytes) -> Operation:
        return cls(request_delete_range=DeleteRange(key))


class Compare(Message, frozen=True):
    """A condition on a key's `mod_revision`, which is 0 where the key is absent."""

    key: bytes
    mod_revision: int = 0
    result: Literal["", "EQUAL", "GREATER"] = ""  # never left out: etcd's default is EQUAL, ours none
    target: Literal["", "MOD", "VALUE"] = ""
    value: bytes = b""

    @classmethod
    def at(cls, key: bytes, mod_revision: int) -> Compare:
        return cls(key, mod_revision, "EQUAL", "MOD")

    @classmethod
    def present(cls, key: bytes) -> Compare:
        return cls(key, 0, "GREATER", "MOD")

    @classmethod
    def holds(cls, key: bytes, value: bytes) -> Compare:
        return cls(key, 0, "EQUAL", "VALUE", value)


class Transaction(Message, frozen=True):
    success: list[Operation] = []
    compare: list[Compare] = []
    failure: list[Operation] = []


class WatchCreate(Message, frozen=True):
    key: bytes
    range_end: bytes = b""
    start_revision: int = 0
    watch_id: int = 0
    fragment: bool = False


class WatchAsked(Message, frozen=True):
    """One message to a stream of watches."""

    create_request: WatchCreate | None = None


class LeaseAsked(Message, frozen=True):
    """A new lease of etcd's, for so many seconds."""

    ttl: int = msgspec.field(default=0, name="TTL")


class KeepLease(Message, frozen=True):
    """The lease of that number is to last for its seconds again, from now on."""

    lease: int = msgspec.field(default=0, name="ID")


class StatusAsked(Message, frozen=True):
    pass


class Authenticate(Message, frozen=True):
    name: str
    password: str

    def __repr__(self) -> str:
        return "Authenticate(...)"


# What is answered


class Header(Message, frozen=True):
    """Who answered, and where it stood. `cluster_id` is a number of 64 bits without sign, kept as its digits."""

    cluster_id: str = ""
    member_id: str = ""
    revision: int = 0
    raft_term: int = 0


class KeyValue(Message, frozen=True):
    key: bytes = b""
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0


class Answer(Message, frozen=True):
    """What every answer has."""

    header: Header = Header()


class Ranged(Answer, frozen=True):
    """`count` is of all keys in the range, whatever limit and filter left out."""

    kvs: list[KeyValue] = []
    more: bool = False
    count: int = 0


class Result(Message, frozen=True):
    response_range: Ranged | None = None


class Transacted(Answer, frozen=True):
    succeeded: bool = False
    responses: list[Result] = []

    @property
    def ranges(self) -> list[Ranged]:
        return [result.response_range or Ranged() for result in self.responses]


class Authenticated(Answer, frozen=True):
    token: str = ""


class LeaseGranted(Answer, frozen=True):
    lease: int = msgspec.field(default=0, name="ID")
    ttl: int = msgspec.field(default=0, name="TTL")


class LeaseKept(Answer, frozen=True):
    """`ttl` is in how many seconds it ends; 0 where there is no such lease."""

    ttl: int = msgspec.field(default=0, name="TTL")


class Event(Message, frozen=True):
    kv: KeyValue = KeyValue()
    type: Literal["PUT", "DELETE"] = "PUT"


class Watched(Answer, frozen=True):
    watch_id: int = 0
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    fragment: bool = False
    events: list[Event] = []


class Status(Answer, frozen=True):
    """A member's state; `leader` is its leader's id, as digits, "0" or empty while it has none."""

    version: str = ""
    leader: str = ""
    errors: list[str] = []


A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Method(Generic[A]):
    """A method of etcd's: its path in the gateway, its name in gRPC, and what it answers.

    `is_stream`: it takes a stream and answers with one; a call is of one message each way.
    """

    path: str
    name: str
    answer: type[A]
    is_stream: bool = False

    @property
    def operation(self) -> str:
        """What it is called where calls are counted: `Range`, `Txn`."""
        return self.name.rpartition("/")[2]


RANGE: Final = Method("/v3/kv/range", "/etcdserverpb.KV/Range", Ranged)
TRANSACT: Final = Method("/v3/kv/txn", "/etcdserverpb.KV/Txn", Transacted)
GRANT_LEASE: Final = Method("/v3/lease/grant", "/etcdserverpb.Lease/LeaseGrant", LeaseGranted)
KEEP_LEASE: Final = Method("/v3/lease/keepalive", "/etcdserverpb.Lease/LeaseKeepAlive", LeaseKept, is_stream=True)
AUTHENTICATE: Final = Method("/v3/auth/authenticate", "/etcdserverpb.Auth/Authenticate", Authenticated)
STATUS: Final = Method("/v3/maintenance/status", "/etcdserverpb.Maintenance/Status", Status)

_encode: Final = msgspec.json.Encoder().encode
_decoders: Final[dict[type[Any], msgspec.json.Decoder[Any]]] = {}


def encode(message: Message) -> bytes:
    return _encode(message)


def encode_creates(creates: list[WatchCreate]) -> bytes:
    """The requests of one watch stream, one a line."""
    return b"\n".join(_encode(WatchAsked(create)) for create in creates)


def decode(raw: bytes, kind: type[A]) -> A:
    """The message in a JSON text. Raises `ValueError` for what is none."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind, strict=False)
    message: A = decoder.decode(raw)
    return message


def prefix_end(prefix: bytes) -> bytes:
    """Where the keys that begin with `prefix` end: the first key after all of them."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\0"
