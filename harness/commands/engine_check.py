"""Find an engine that errs or cheats: wrong tokens, reads or memory that the table does not see."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.commands import amount

HELP = "does an engine of one's own answer correctly and honestly?"
_BESIDE_BYTES = 512 << 20  # an interpreter and its libraries, beside half of the file


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("named_command", metavar="NAME='COMMAND ...'", help="see docs/engines.md")
    parser.add_argument("file", type=Path, nargs="?", help="a GGUF file (default: a tiny one)")
    parser.add_argument("--memory", help="its limit (default: half of the file and 512MiB)")
    parser.add_argument(
        "--wait-seconds", type=amount, default=120.0, help="for any one line of its answers"
    )


def run(arguments: argparse.Namespace) -> None:
    from tempfile import TemporaryDirectory

    from flashmoe.errors import FlashMoEError
    from flashmoe.util.sizes import parse_bytes
    from harness import tiny_gguf
    from harness.engine_check import Terms, check
    from harness.runs.gguf_systems import user_engine

    name, command = user_engine.parse(arguments.named_command)
    with TemporaryDirectory(prefix="flashmoe-") as folder:
        file = arguments.file or tiny_gguf.write(Path(folder) / "tiny.gguf")
        if not file.is_file():
            raise FlashMoEError(f"{file} is no file: name a GGUF file, or none for a tiny one")
        default = file.stat().st_size // 2 + _BESIDE_BYTES
        limit = parse_bytes(arguments.memory) if arguments.memory else default
        found = check(command, Terms(file.absolute(), limit, arguments.wait_seconds))
    for sentence in found:
        print(f"{name}: {sentence}")
    if found:
        sys.exit(1)
    print(f"{name} conforms")
