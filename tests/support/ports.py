"""Ports for servers in tests."""

from __future__ import annotations

import socket

__all__ = ["free_port"]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now.

    Another process may take it before it is used, though the kernel hands out others first: a server that can be
    told to bind port 0, or given a bound socket, is better off so.
    """
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
    return port
