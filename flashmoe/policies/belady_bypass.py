"""Belady's optimum where a cache need not admit what it reads."""

from __future__ import annotations

from flashmoe.policies.base import Scope
from flashmoe.policies.belady import Belady


class BeladyBypass(Belady):
    """Keeps the experts whose next uses are nearest, even if it keeps none of those just read.

    McFarling's 'optimal with bypass'. Even the experts of the current event may go once they are
    served, so this bounds every cache that can compute from a buffer outside its slots.
    """

    name = "belady-bypass"
    bypasses = True

    def __init__(self, scope: Scope, n_slots: int) -> None:
        super().__init__(scope, n_slots)
        self.bypass_slots = scope.n_keys  # a bound, whatever there is
