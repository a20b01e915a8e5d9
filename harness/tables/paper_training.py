"""How the shipped networks of `flashmoe-paper` learnt, from the record in their files."""

from __future__ import annotations

from typing import Any

from flashmoe.policies import flashmoe_paper
from flashmoe.policies.parts import policy_file


def table() -> list[dict[str, Any]]:
    """A row for each network and epoch: mean squared errors in training and on held-out rows."""
    rows = []
    for path in (flashmoe_paper.SHIPPED, flashmoe_paper.SHIPPED_VECTOR):
        _, about = policy_file.read(path, flashmoe_paper.KIND)
        for epoch, (training, held_out) in enumerate(about["curve"], 1):
            rows.append(
                {
                    "network": about["shape"],
                    "epoch": epoch,
                    "training_error": training,
                    "held_out_error": held_out,
                }
            )
    return rows
