"""List the eviction policies, with what each one does."""

from __future__ import annotations

import argparse
import inspect

from flashmoe import policies

HELP = "list the eviction policies"


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> None:
    for name, policy in policies.available().items():
        summary = (inspect.getdoc(policy) or "").splitlines()[0]
        if policy.parameter:
            summary += f" [{name}:{policy.parameter}]"
        print(f"{name:16} {summary}{' (replay only)' if policy.offline else ''}")
