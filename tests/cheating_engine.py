"""The reference adapter with one cheat or mistake: `python cheating_engine.py CHEAT`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.runs.engines import reference_adapter as honest

load, tokens, say = honest.load, honest.tokens, honest.say
cheat = sys.argv[1]
memory: list[list[int]] = []


def loads_after_loaded(asked):
    later = ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), load(asked))[1])
    honest.tokens = lambda server, prompt, new: tokens(later.result(), prompt, new)


def loads_a_cached_copy(asked):
    """Reading the copy fills the cache; of what is cached nothing comes from the drive."""
    return load(asked | {"file": os.environ["CACHED_COPY"]})


def loads_a_copy_in_memory(asked):
    """Of which nothing comes from the drive."""
    return load(asked | {"file": os.environ["COPY_IN_MEMORY"]})


HELPER = """
import os, sys, time
from pathlib import Path
root = Path("/sys/fs/cgroup/memory")
root = root if root.exists() else Path("/sys/fs/cgroup")
(root / "cgroup.procs").write_text(str(os.getpid()))
content = Path(sys.argv[1]).read_bytes()
print("ready", flush=True)
time.sleep(600)
"""


def has_a_helper_outside(asked):
    helper = subprocess.Popen(
        [sys.executable, "-c", HELPER, asked["file"]],
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    helper.stdout.readline()
    return load(asked)


def holds_memory_elsewhere(asked):
    """A page is charged to where the process is when it comes, and stays there."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    group = next(line for line in lines if ":memory:" in line or line.startswith("0::"))
    root = Path("/sys/fs/cgroup/memory" if ":memory:" in group else "/sys/fs/cgroup")
    own = root / group.rpartition(":")[2].lstrip("/")
    (root / "cgroup.procs").write_text(str(os.getpid()))
    memory.append(bytearray(b"1") * (64 << 20))
    (own / "cgroup.procs").write_text(str(os.getpid()))
    return load(asked)


def says_loading_was_quick(asked):
    time.sleep(0.5)
    return load(asked)


def the_same_token(server, prompt, new):
    yield from [7] * new


def counts_up(server, prompt, new):
    yield from (prompt[-1] + 1 + number for number in range(new))


def remembers_the_last_prompt(server, prompt, new):
    memory.append(prompt)
    yield from tokens(server, (memory[-2] if len(memory) > 1 else []) + prompt, new)


def looks_at_how_many_are_asked(server, prompt, new):
    yield from tokens(server, prompt if new > 1 else prompt[:-1], new)


def holds_back(server, prompt, new):
    made = []
    for token in tokens(server, prompt, new):
        time.sleep(0.05)
        made.append(token)
    yield from made


def holds_back_alone_too(server, prompt, new):
    made = list(slowly(server, prompt, max(new, 16)))
    yield from made[:new]


def no_such_token(server, prompt, new):
    yield from [1 << 40] * new


def slowly(server, prompt, new):
    for token in tokens(server, prompt, new):
        time.sleep(0.05)
        yield token


def dies_midway(server, prompt, new):
    yield next(tokens(server, prompt, new))
    sys.exit("no more tokens")


def hangs(server, prompt, new):
    yield next(tokens(server, prompt, new))
    time.sleep(600)


def too_few(server, prompt, new):
    yield from tokens(server, prompt, new - 1)


def says_otherwise(kind, **fields):
    if cheat == "a_slow_clock" and kind == "token":
        fields["seconds"] /= 10
    elif cheat == "a_clock_that_goes_back" and kind == "token":
        fields["seconds"] = 1 / (1 + fields["seconds"])
    elif cheat == "says_loading_was_quick" and kind == "loaded":
        fields["seconds"] = 0
    elif cheat == "a_field_is_missing" and kind == "token":
        del fields["seconds"]
    elif cheat == "a_token_is_text" and kind == "token":
        fields["token"] = str(fields["token"])
    elif cheat == "another_protocol" and kind == "hello":
        fields["protocol"] = 2
    elif cheat == "another_format" and kind == "hello":
        fields["formats"] = ["safetensors"]
    elif cheat == "no_json" and kind == "loaded":
        print("model loaded!", flush=True)
    elif cheat == "no_end_of_lists" and kind == "loaded":
        print("[" * 100_000, flush=True)
    elif cheat == "a_huge_number" and kind == "token":
        fields["seconds"] = 10**400
    elif cheat == "an_error":
        kind, fields = "error", {"message": "no such model"}
    say(kind, **fields)


def leaves_a_process():
    subprocess.Popen(["sleep", "600"], start_new_session=True)


LOADS = (
    loads_after_loaded,
    loads_a_cached_copy,
    loads_a_copy_in_memory,
    has_a_helper_outside,
    holds_memory_elsewhere,
    says_loading_was_quick,
)
ANSWERS = (
    the_same_token, counts_up, remembers_the_last_prompt, looks_at_how_many_are_asked, holds_back,
    holds_back_alone_too, no_such_token, dies_midway, hangs, too_few,
)  # fmt: skip
honest.load = {f.__name__: f for f in LOADS}.get(cheat, load)
honest.tokens = {f.__name__: f for f in ANSWERS}.get(cheat, tokens)
honest.say = says_otherwise
if cheat == "a_slow_clock":
    honest.tokens = slowly
if cheat == "leaves_a_process":
    leaves_a_process()
honest.main()
