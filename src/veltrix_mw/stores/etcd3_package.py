"""The package `etcd3`, of which a client can be handed in: whether it can be imported where it is installed.

Owns what is told of it. Does not import it: that is what may fail, in protobuf, with words that do not help.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

from veltrix_mw.findings import Said, ok, warn

__all__ = ["said_of_etcd3"]

_TOO_NEW: Final = 4  # protobuf's first release that takes no stubs of the package's age


def said_of_etcd3() -> Said | None:
    """What to say of the package; None where it is not installed."""
    try:
        own, protobuf = version("etcd3"), version("protobuf")
    except PackageNotFoundError:
        return None
    major = protobuf.partition(".")[0]
    if not major.isdigit() or int(major) < _TOO_NEW:
        return ok(f"the package etcd3 {own} is installed beside protobuf {protobuf}: its client can be handed in")
    return warn(
        f"the package etcd3 {own} is installed beside protobuf {protobuf}, so that `import etcd3` raises a TypeError. "
        "This library needs no etcd3: name etcd by its URL; or give it an environment of its own, with "
        "pip install 'veltrix-mw[etcd3]'"
    )
