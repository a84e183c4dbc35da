"""The relay's report: what becomes of a relay, told to whoever runs one in the foreground.

Owns which turns of events are told, and that each is told once; decides nothing (`relay` does). No thread, socket or
clock in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veltrix_mw.errors import AuthFailed, Compacted, LeaseLost
from veltrix_mw.protocols import CertificateFault, Position
from veltrix_mw.relay import (
    Elected,
    Fill,
    Followed,
    Inspected,
    Looked,
    Refused,
    Relay,
    RelayDecision,
    RelayEvent,
    Written,
)
from veltrix_mw.replica import Confirmed, Failed, Listed, Received, Watching

__all__ = ["Report", "ReportingRelay"]

Report = Callable[[str, Mapping[str, Any]], None]
"""Takes an event's name and its fields, which hold no values and no secrets."""


class ReportingRelay(Relay):
    """A relay that reports what becomes of it.

    Decides as `Relay` does, and looks at the authority also while it stands by: whoever runs a second relay wants to
    know that it could take over. A state that lasts is reported once, when it begins. Events, and their fields:
    `elected`; `standing_by` (holder); `resumed` (revision); `refilled` (revision, entries, reason); `restored`
    (incarnation); `authority_failed`, `mirror_failed`, `barred`, `deposed`, `resigned` (reason); `authority_answers`,
    `mirror_answers`; `refused` (tier, reason): the credentials were never taken, trying again is no use.
    """

    def __init__(self, report: Report, *, lazy: Sequence[str] = ()) -> None:
        super().__init__(lazy=lazy, looks=True)
        self._report = report
        self._told_holder = ""
        self._filling: tuple[Position, int] | None = None  # what is being written: where that stands, how many entries
        self._why_filled = ""
        # Whether a tier ever took the credentials, and whether it fails now.
        self._let_in = {"authority": False, "mirror": False}
        self._fails = {"authority": False, "mirror": False}

    def handle(self, event: RelayEvent) -> RelayDecision:
        leads_before = self.leads
        decision = super().handle(event)
        match event:
            case Elected():
                self._tell_election(event)
            case Looked():
                if event.error is None:
                    self._answered("authority")
                else:
                    self._failed("authority", event.error)
            case Inspected():
                self._tell_inspection(event)
            case Written():
                self._tell_written()
            case Followed():
                self._tell_followed(event)
            case Refused():
                self._tell_refusal(event, leads_before=leads_before)
        self._tell_decision(decision)
        return decision

    def _tell_election(self, event: Elected) -> None:
        self._answered("mirror")
        if event.lease is not None:
            self._told_holder = ""
            self._tell("elected")
        elif event.holder != self._told_holder:
            self._told_holder = event.holder
            self._tell("standing_by", holder=event.holder)

    def _tell_inspection(self, event: Inspected) -> None:
        if self._copy.position.incarnation:
            self._tell("resumed", revision=self._copy.position.revision)
        elif event.position.incarnation:
            left_out = ", ".join(event.state.lazy) or "nothing"
            self._why_filled = f"it left out {left_out}: other prefixes than this relay's"
        elif event.state.position.incarnation:
            self._why_filled = "it did not add up"
        else:
            self._why_filled = "it was empty"

    def _tell_written(self) -> None:
        filled, self._filling = self._filling, None
        if filled is not None:
            position, entries = filled
            self._tell("refilled", revision=position.revision, entries=entries, reason=self._why_filled)

    def _tell_followed(self, event: Followed) -> None:
        inner = event.event
        if isinstance(inner, Failed):
            if not isinstance(inner.error, Compacted):  # then it lists: nothing is wrong
                self._failed("authority", inner.error)
        elif isinstance(inner, (Listed, Confirmed, Watching)) or (isinstance(inner, Received) and inner.batches):
            self._answered("authority")

    def _tell_refusal(self, event: Refused, *, leads_before: bool) -> None:
        self._filling = None
        error = event.error
        if leads_before and isinstance(error, Compacted):
            return  # it is filled anew, which is told when it is done
        if isinstance(error, LeaseLost):
            if leads_before:
                self._tell("deposed", reason=str(error))
            return
        self._failed("mirror", error)

    def _tell_decision(self, decision: RelayDecision) -> None:
        for notice in decision.notices:
            if notice.event == "veltrix.restored":
                self._tell("restored", incarnation=notice.fields["incarnation"])
            elif notice.event in {"veltrix.mirror_refilled", "veltrix.relist"}:
                self._why_filled = str(notice.fields["reason"])
            elif notice.event == "veltrix.relay_resigned":
                self._tell("resigned", reason=str(notice.fields["reason"]))
        if isinstance(decision.step, Fill):
            self._filling = decision.step.listing.position, len(decision.step.listing.entries)

    def _failed(self, tier: str, error: Exception) -> None:
        if isinstance(error, AuthFailed) and not self._let_in[tier]:
            self._tell("refused", tier=tier, reason=str(error))
        elif not self._fails[tier]:
            self._fails[tier] = True
            barred = tier == "mirror" and isinstance(error, AuthFailed) and not isinstance(error, CertificateFault)
            self._tell("barred" if barred else f"{tier}_failed", reason=str(error))

    def _answered(self, tier: str) -> None:
        self._let_in[tier] = True
        if self._fails[tier]:
            self._fails[tier] = False
            self._tell(f"{tier}_answers")

    def _tell(self, event: str, **fields: Any) -> None:
        self._report(event, fields)
