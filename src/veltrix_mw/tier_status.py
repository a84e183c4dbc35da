"""The tiers' status: how each store does, as this process sees it.

Owns what is said of a tier that is followed, and of one that stands by. The shape of the answer is `status`'s.
"""

from __future__ import annotations

from veltrix_mw.protocols import Store
from veltrix_mw.replica import Replica
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.status import TierStatus
from veltrix_mw.stores.mirrored import MirroredStore
from veltrix_mw.stores.tiers import Tier

__all__ = ["tiers_of"]


def tiers_of(store: Store, snapshot: Snapshot, replica: Replica | None, *, running: bool) -> tuple[TierStatus, ...]:
    """How each tier of `store` does: the one that is followed as `replica` sees it, another as it was last asked."""
    followed = _followed(store, snapshot, replica, running=running)
    if not isinstance(store, MirroredStore):
        return (followed,)
    tiers = store.tiers
    if running and tiers.current is Tier.MIRROR:
        authority, known = store.authority.info, tiers.known
        revision = 0 if known is None else known.revision
        return (TierStatus(authority.origin, "authority", authority.url, "standby", revision, 0, ""), followed)
    state = tiers.mirror
    return (
        followed,
        TierStatus(
            name=store.mirror.info.origin,
            role="mirror",
            url=store.mirror.info.url,
            state=tiers.fault_kind if running else "stopped",
            revision=0 if state is None else state.position.revision,
            lag=0 if state is None else max(0, snapshot.revision - state.position.revision),
            error=tiers.fault,
        ),
    )


def _followed(store: Store, snapshot: Snapshot, replica: Replica | None, *, running: bool) -> TierStatus:
    info, role = store.info, "authority"
    if running and isinstance(store, MirroredStore) and store.tiers.current is Tier.MIRROR:
        info, role = store.mirror.info, "mirror"
    error = None if replica is None else replica.error
    return TierStatus(
        name=info.origin,
        role=role,
        url=info.url,
        state=replica.state if running and replica is not None else "stopped",
        revision=snapshot.revision if snapshot.origin not in {"disk", "none"} else 0,
        lag=0 if replica is None else replica.lag,
        error="" if error is None else str(error),
    )
