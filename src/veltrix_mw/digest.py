"""The digest: what tells two keyspaces apart without comparing them.

Owns an entry's share of it; who holds the entries adds them up.
"""

from __future__ import annotations

from hashlib import blake2b

__all__ = ["digest_of"]


def digest_of(key: str, mod_revision: int) -> int:
    """One entry's share of the digest: BLAKE2b of 8 bytes over key, NUL, decimal `mod_revision`, big-endian."""
    return int.from_bytes(blake2b(f"{key}\0{mod_revision}".encode(), digest_size=8).digest(), "big")
