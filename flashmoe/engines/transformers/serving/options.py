"""The flags after `--`: what `flashmoe serve` asks of this engine alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from flashmoe.engines.transformers.arithmetic import ARITHMETIC, EXACT
from flashmoe.errors import FlashMoEError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlashMoEError(f"after `--`: {message}; there may stand {self.format_usage()[7:-1]}")


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """device, arithmetic, no_prefetch and kept_memory. Raises FlashMoEError for anything else."""
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", choices=ARITHMETIC, default=EXACT)
    parser.add_argument("--no-prefetch", action="store_true")
    parser.add_argument("--kept-memory", metavar="SIZE")
    return parser.parse_args(flags)
