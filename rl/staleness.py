"""This file bounds how old a trained group may be: the Gate that admits draws, and the check at consumption."""

from __future__ import annotations


class Gate:
    """Counts the groups that are sampled, waiting or trained, and says how many more may be drawn.

    Quota (AReaL, arXiv 2505.24298): accepted + running <= (max_lag + version + 1) * groups_per_step, where `version`
    is the one that the generators confirmed, so that no token of a group admitted now is older than it.

    Why it bounds the lag. Let L = max_lag, N = groups_per_step, and let group g be admitted at version v. Were groups
    consumed in the order of admission, only groups that count in `accepted + running` at that moment could be trained
    before g: at most (L + v + 1) * N - 1 of them; a drop makes it fewer, and what its freed capacity lets in comes
    behind g. Version w means that w * N groups were trained, so when g is consumed w <= ((L + v + 1) * N - 1) / N,
    that is w <= L + v. The oldest token of g is at least v: its lag is at most L.

    Why `is_fresh` is still asked at consumption. Groups are consumed in the order in which they finish; a slow one is
    overtaken by groups admitted later, the count above no longer holds, and its lag has no bound but this check.

    A tightened gate uses allowed_lag < L above, which makes the quota smaller and breaks none of this.

    Nothing waits for ever: with nothing running and fewer than N groups waiting, room(version) is at least 1 once the
    generators confirmed a version that is at most allowed_lag behind the learner's. That is why weights.every_steps
    must not exceed max_lag + 1.
    """

    def __init__(self, max_lag: int, groups_per_step: int) -> None:
        assert max_lag >= 0 and groups_per_step >= 1
        self.max_lag = max_lag
        self.allowed_lag = max_lag  # what admission goes by: less than max_lag while a guardrail asks for fresher data
        self.groups_per_step = groups_per_step
        self.accepted = 0  # published and not dropped since: waiting, leased, or trained
        self.running = 0  # admitted and not yet published or dropped

    def room(self, version: int) -> int:
        """Groups that may be admitted now; `version` is the oldest that the generators confirmed."""
        return max(0, (self.allowed_lag + version + 1) * self.groups_per_step - self.accepted - self.running)

    def round_open(self, version: int) -> bool:
        """Whether a round of room(version) groups may start together.

        Used where max_lag is 0: a round starts only when nothing runs, so that what it holds depends on no timing.
        """
        return self.running == 0 and self.room(version) > 0

    def tighten(self) -> None:
        """Admit as if max_lag were one less, down to 0; what was admitted before keeps its place."""
        self.allowed_lag = max(0, self.allowed_lag - 1)

    def relax(self) -> None:
        """Take one `tighten` back."""
        self.allowed_lag = min(self.max_lag, self.allowed_lag + 1)

    def admit(self) -> None:
        """A draw goes to a generator; the caller asked room() in the same turn of the event loop."""
        self.running += 1

    def publish(self) -> None:
        """A running group is in the buffer."""
        assert self.running > 0, "a group was published that was never admitted"
        self.running -= 1
        self.accepted += 1

    def drop_running(self) -> None:
        """A running group ended unpublished (zero advantage, failure, abort, too large): its capacity comes back."""
        assert self.running > 0, "a group was dropped that was never admitted"
        self.running -= 1

    def drop_accepted(self, count: int = 1) -> None:
        """Published groups left the buffer untrained (stale, surplus): their capacity comes back."""
        assert 0 <= count <= self.accepted, f"{count} groups dropped of {self.accepted} accepted"
        self.accepted -= count

    def lose_accepted(self) -> None:
        """A published group was lost with Redis's last second: it is sampled again, within the capacity it has."""
        assert self.accepted > 0, "a group was lost that was never accepted"
        self.accepted -= 1
        self.running += 1

    @staticmethod
    def lag(version: int, oldest_version: int) -> int:
        """The one definition of lag: the learner's version at consumption minus the oldest sampled token's."""
        return version - oldest_version

    def is_fresh(self, version: int, oldest_version: int) -> bool:
        """Whether a group may be trained at the learner's `version`: the hard bound."""
        return self.lag(version, oldest_version) <= self.max_lag

    def resume(self, accepted: int) -> None:
        """Count what an earlier process left: trained, leased and waiting groups, which the buffer knows.

        What it left unfinished is admitted again, draw by draw.
        """
        self.accepted = accepted
