"""Write docs/families.md: which MoE families of transformers are streamed as they should be."""

from __future__ import annotations

import argparse

HELP = "which MoE families are streamed as they should be"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> None:
    from harness import tiny_models
    from harness.tables import families

    families.write([families.examine(family) for family in tiny_models.families()])
