"""`flashmoe chat` with the demo model: in a terminal, and without one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from command_line import run

QUESTION = "And it came to pass in those days"
COMMAND = [sys.executable, "-m", "flashmoe", "chat", "--memory", "64MiB", "--policy", "lru"]
SECONDS = 60  # after which it hangs
WHERE_IS_THE_CURSOR, IN_THE_CORNER = b"\x1b[6n", b"\x1b[1;1R"


def read_until(terminal: int, text: str) -> str:
    """What a terminal shows, up to and with `text`."""
    shown, end = "", time.monotonic() + SECONDS
    while text not in shown:
        assert select.select([terminal], [], [], end - time.monotonic())[0], shown
        data = os.read(terminal, 1 << 16)
        if WHERE_IS_THE_CURSOR in data:
            os.write(terminal, IN_THE_CORNER)
        shown += re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", data.decode(errors="replace"))
    return shown


def test_in_a_terminal_it_answers_and_its_server_ends_with_it(capfd, tmp_path):
    tokens = "--max-new-tokens", 6
    _, out, _ = run(capfd, "generate", "--raw", "--prompt", QUESTION, "--policy", "lru", *tokens)
    expected = out.removeprefix(QUESTION).strip()
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    variables = {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    chat = subprocess.Popen(
        [*COMMAND, "--stats", "--max-tokens", "6"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | variables,
    )  # fmt: skip
    try:
        read_until(ours, "no answer yet")
        os.write(ours, f"{QUESTION}\r".encode())
        read_until(ours, expected)
        read_until(ours, "token/s")
        (server,) = Path(f"/proc/{chat.pid}/task/{chat.pid}/children").read_text().split()
        chat.send_signal(signal.SIGKILL)
        end = time.monotonic() + SECONDS
        while Path(f"/proc/{server}").exists() and not _is_zombie(server):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        chat.kill()
        chat.wait()
        os.close(ours)
        os.close(theirs)


def _is_zombie(process: str) -> bool:
    """It has ended, though nobody has taken note."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_what_its_server_refuses_is_said_in_the_servers_words(tmp_path):
    done = subprocess.run(
        [*COMMAND, str(tmp_path / "none")], input="Hello\n", capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"flashmoe: \S+/none: no file is there.*\n", done.stderr)
