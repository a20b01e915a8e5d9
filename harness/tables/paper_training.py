"""How the networks of `flashmoe-paper` learnt, from the record in their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashmoe.policies import flashmoe_paper
from flashmoe.policies.parts import policy_file
from harness.tables.paper_networks import KINDS, REPLAYS, Routing, path_of


def table(routings: Sequence[Routing], networks: Path) -> list[dict[str, Any]]:
    """A row a trace, replay, reading and number of slots: mean squared errors, and rows.

    The first epoch, and the one with the least error on held-out sequences, which was kept.
    """
    rows = []
    for routing in routings:
        for replay in REPLAYS:
            for reading in KINDS:
                path = path_of(networks, routing.name, replay, reading)
                _, about = policy_file.read(path, flashmoe_paper.KIND)
                for slots, curve in about["curves"].items():
                    best = min(range(len(curve)), key=lambda epoch: curve[epoch][1])
                    trained, held_out = about["rows"][slots]
                    rows.append(
                        {
                            "trace": routing.name,
                            "replay": replay,
                            "reading": reading,
                            "slots": int(slots) if reading != "experts" else None,
                            "rows_a_layer": trained,
                            "held_out_rows_a_layer": held_out,
                            "epochs": len(curve),
                            "first_held_out_error": curve[0][1],
                            "best_epoch": best + 1,
                            "training_error": curve[best][0],
                            "held_out_error": curve[best][1],
                        }
                    )
    return rows
