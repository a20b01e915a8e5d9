"""How many of a layer's experts a prompt needs."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "experts that prompts of recorded routing need, by their tokens"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traces", type=Path, required=True, help="a folder of real models' traces"
    )


def run(arguments: argparse.Namespace) -> Path:
    from harness.report import report
    from harness.reproduce import folder_for
    from harness.tables import hit_rates, prompt_experts

    folder = folder_for("full-scale")
    cases = hit_rates.shipped_cases(hit_rates.demo_expert_bytes(), hit_rates.STAND_INS)
    cases += hit_rates.outside_cases(arguments.traces)
    report.write(folder, prompt_experts.TITLE, prompt_experts.table(cases))
    report.record(folder, prompt_experts.TITLE, arguments.command_line)
    return folder
