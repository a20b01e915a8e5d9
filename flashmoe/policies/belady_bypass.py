"""Belady's optimum where a miss need not be kept."""

from __future__ import annotations

from flashmoe.policies.base import Scope
from flashmoe.policies.belady import Belady


class BeladyBypass(Belady):
    """Keeps the experts whose next uses are nearest, though it be none of those just read.

    McFarling's 'optimal with bypass'. Even the event's own experts may go once they are
    served, so this bounds every cache that can compute from a buffer outside its slots.
    """

    name = "belady-bypass"

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.bypasses = True
