"""A client of etcd's that the application made: our calls on its channel, with its metadata.

Owns what is asked of such a client: `.channel`, a `grpc.Channel`, and `.metadata`, which holds its token. The package
`etcd3` makes one; any object that has both will do. It is never closed, as it is the application's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol, TypeVar

import grpc

from veltrix_mw.errors import SettingsError, StoreUnavailable
from veltrix_mw.faults import without_credentials
from veltrix_mw.settings import Host
from veltrix_mw.stores.etcd_grpc import GrpcStream, ask, meaning
from veltrix_mw.stores.etcd_members import Failed
from veltrix_mw.stores.etcd_messages import Answer, Message, Method, WatchCreate
from veltrix_mw.stores.etcd_protobuf import decode, encode

__all__ = ["LOGIN", "Adopted", "EtcdClient"]

LOGIN = (
    "the client that was handed in has no token, or one that ran out, and keeps no password to ask for another: hand "
    "in a new one, or name etcd by its URL, etcd://USER:PASSWORD@HOST:2379/NAMESPACE?transport=grpc, and it is renewed"
)
"""What to do where etcd wants a user."""

# How long a stream lives that was left and cannot be cancelled. The store opens its own anew long before: see `etcd`.
_STREAM_MOST_S: Final = 900.0

A = TypeVar("A", bound=Answer)


class EtcdClient(Protocol):
    """What a client has that can be handed in. `metadata` is read anew for each call."""

    channel: grpc.Channel
    metadata: Iterable[tuple[str, str]] | None


class _Lent:
    """Its channel, for one stream."""

    is_dropped = False

    def __init__(self, channel: grpc.Channel) -> None:
        self.lent = channel

    def close(self) -> None:
        """Leave it open: it is the application's."""


class Adopted:
    """The transport over a client that was handed in.

    Thread-safe. In a forked child it refuses to work: gRPC's channels do not survive that.
    """

    def __init__(self, client: EtcdClient) -> None:
        if not isinstance(client.channel, grpc.Channel):
            raise SettingsError(
                f"the channel of the {type(client).__name__} that was handed in is a {type(client.channel).__name__}; "
                "a client needs a grpc.Channel, as etcd3.client() has (not grpc.aio)"
            )
        self._client = client
        self._pid = os.getpid()
        self.host = _target(client.channel)
        self.is_secure = bool(getattr(client, "uses_secure_channel", False))

    def call(
        self,
        host: Host,
        method: Method[A],
        request: Message,
        *,
        token: str,  # noqa: ARG002  # it has its own
        begun_by_s: float,
        by_s: float,
        once: bool,  # noqa: ARG002
    ) -> A:
        self._check()
        try:
            raw = ask(
                self._client.channel,
                method.name,
                encode(request),
                self._metadata(),
                begun_by_s=begun_by_s,
                by_s=by_s,
            )
            return decode(raw, method.answer)
        except grpc.RpcError as exc:
            raise meaning(exc, host) from exc
        except ValueError as exc:
            # gRPC's own for a channel that was closed; a message that is none.
            raise Failed(
                f"the etcd client that was handed in cannot be used ({without_credentials(str(exc))})", in_vain=True
            ) from exc

    def watch(self, host: Host, creates: Sequence[WatchCreate], *, token: str, by_s: float) -> GrpcStream:  # noqa: ARG002
        self._check()
        try:
            return GrpcStream(_Lent(self._client.channel), creates, self._metadata(), host, most_s=_STREAM_MOST_S)
        except ValueError as exc:
            raise Failed(
                f"the etcd client that was handed in cannot be used ({without_credentials(str(exc))})", in_vain=True
            ) from exc

    def drop(self, host: Host | None = None) -> None:
        """Nothing: what is open is the application's."""

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("hasleader", "true"), *(self._client.metadata or ()))

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise StoreUnavailable(
                "the etcd client that was handed in was made before this process was forked, and gRPC does not survive "
                "that: make both it and its ConfigClient in the child (gunicorn: without --preload, or in post_fork), "
                "or name etcd by its URL, etcd://HOST:2379/NAMESPACE?transport=grpc"
            )


def _target(channel: Any) -> Host:
    """Where it goes, as far as gRPC tells; for messages alone."""
    try:
        inner = channel
        while hasattr(inner, "_channel"):  # that of an interceptor is around another
            inner = inner._channel
        inner.check_connectivity_state(False)  # raises where it was closed: asked then, gRPC ends the process
        target = inner.target()
        host, _, port = target.decode().rpartition("/")[2].rpartition(":")
        return host.strip("[]"), int(port)
    except (AttributeError, TypeError, ValueError):
        return "etcd", 2379
