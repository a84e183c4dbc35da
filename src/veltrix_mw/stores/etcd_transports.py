"""The transports to etcd, by name.

Imports one only when it is named: whoever takes one needs not have the other one's driver.
"""

from __future__ import annotations

from typing import Literal

from veltrix_mw.stores.etcd_members import Transport
from veltrix_mw.stores.tls import Tls

__all__ = ["TransportName", "make_transport"]

TransportName = Literal["gateway", "grpc"]


def make_transport(name: TransportName, tls: Tls | None) -> Transport:
    """The transport of that name; it opens nothing. Raises `ImportError` where its driver is not installed."""
    if name == "grpc":
        from veltrix_mw.stores.etcd_grpc import Grpc

        return Grpc(tls)
    from veltrix_mw.stores.etcd_gateway import Gateway

    return Gateway(tls)
