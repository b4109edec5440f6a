"""This file decides whose turn it is among sources: weights that hold over any window, and turns that are lent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

LITTLE_TO_TEACH = 0.5  # of the signal that the best source promises


class Turn(msgspec.Struct, frozen=True):
    """Which source is drawn from. lender is the source whose turn it was, where it lent it; credit is that one's."""

    source: str
    credit: float
    lender: str | None = None


class Mixture:
    """Turns by weight, and loans.

    Every draw credits each source with its share and gives the turn to the most credited: over any window the turns
    follow the weights, no source more than one turn per source off. A source that has little to teach (its best level
    promises less than half of the signal that the best source's best level does) lends `flexibility` of its turns to
    the sources that have more, by their weights. The weights thus say what is trained, and not what is sampled in vain;
    and a source is drawn in at least the share 1 - flexibility of its turns, so that none starves, and each notices
    when it has something to teach again.
    """

    def __init__(self, weights: Mapping[str, float], flexibility: float) -> None:
        weight_sum = sum(weights.values())
        self._shares = {source: weight / weight_sum for source, weight in weights.items()}
        self._flexibility = flexibility
        self._credits = dict.fromkeys(weights, 0.0)
        self._loans = dict.fromkeys(weights, 0.0)  # what each is due of the turns that others lend
        self._kept = dict.fromkeys(weights, 0.0)  # what each has kept of the turns that it might have lent

    def next(self, signals: Mapping[str, float]) -> Turn:
        """The next turn; signals holds, for each source, the chance that a group of its best level teaches."""
        for source, share in self._shares.items():
            self._credits[source] += share
        owner = max(self._credits, key=lambda name: self._credits[name])
        credit = self._credits[owner]
        self._credits[owner] -= 1.0
        enough = LITTLE_TO_TEACH * max(signals.values())
        borrowers = [source for source, signal in signals.items() if signal >= enough]
        if owner in borrowers:
            return Turn(owner, credit)
        self._kept[owner] += 1.0 - self._flexibility
        if self._kept[owner] >= 1.0 - 1e-9:
            self._kept[owner] -= 1.0
            return Turn(owner, credit)
        weight_sum = sum(self._shares[source] for source in borrowers)
        for source in borrowers:
            self._loans[source] += self._shares[source] / weight_sum
        borrower = max(borrowers, key=lambda name: self._loans[name])
        self._loans[borrower] -= 1.0
        return Turn(borrower, credit, lender=owner)

    def state_dict(self) -> dict[str, Any]:
        """All accounts, JSON-able."""
        return {"credits": dict(self._credits), "loans": dict(self._loans), "kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from a state of the same sources."""
        self._credits = {source: float(state["credits"][source]) for source in self._credits}
        self._loans = {source: float(state["loans"][source]) for source in self._loans}
        self._kept = {source: float(state["kept"][source]) for source in self._kept}
