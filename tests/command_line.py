"""Runs subcommands inside the test's process."""

from __future__ import annotations

from flashmoe import cli


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return status, out, err


def refused(capfd, *arguments: object) -> str:
    """The one sentence of a command that must fail."""
    status, out, err = run(capfd, *arguments)
    assert status == 1
    assert not out
    sentences = [line for line in err.splitlines() if line.startswith("flashmoe: ")]
    assert len(sentences) == 1, err
    assert "Traceback" not in err
    return sentences[0]
