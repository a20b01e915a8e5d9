"""Writes results: tables as CSV and Markdown, provenance, and the README that shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

RESULTS = Path(__file__).parents[2] / "results"

NOTES = {
    "ssd": "Measured. Direct reads of a 768 MiB file of random bytes into huge pages. Where the "
    "drive is shared, rows taken minutes apart differ, and so small a file may come from the "
    "host's cache.",
    "reader": "Measured, the engine's reader and fio in turn on one file, random extents, equal "
    "depth; the ratio is the median of the pairs, with its range.",
    "hit_rates": "Replayed, not measured: recorded routing, event-atomic, batch 1 (a token's top_k "
    "experts of a layer are one event), a cache per layer, prompts counted token by token as a "
    "teacher-forced decode. Only sequences that `learned` was not trained on; `part` says whether "
    "it saw their kind of text, or their model at all. A `stand-in` is a small model of the named "
    "model's layers, experts and top_k, trained for minutes; rows without the word are the real "
    "model. `cold` starts every sequence with an empty "
    "cache and fresh statistics, `one stream` carries everything over, `8 interleaved` serves "
    "eight sequences in turn. `low` and `high` bound the bootstrap 95 % interval over sequences "
    "(or groups of eight), `gap_*` that of the way from LRU to Belady, `over_lru_low` the lower "
    "end of the relative gain. belady, belady-bypass and static see the future. `microseconds`: "
    "cache and policy, a token and layer, compiled, on a shared machine (of the smallest capacity "
    "in tables made before 26 November 2026: compiling too). Bytes are bf16's.",
    "gap_by_layer": "Replayed, cold: LRU, learned and Belady layer by layer.",
    "generation": "Measured, the trained demo model, greedy decode at batch 1, each row a process "
    "of its own, rows interleaved over the rounds, not capped; tokens/s is the median with its "
    "range. The first tokens after the prompt are counted, with the cache as prefill left it. "
    "Roofline: 1 / max(bytes a token / drive, arithmetic), drive being fio's random reads of the "
    "store's own file at its extent size just before or just after each run, whichever was "
    "faster, and arithmetic the least that any row needed for experts and the rest of the model. "
    "`peak_memory_MB` is what the kernel charged the process at most, page cache included. At "
    "27 M parameters Python costs more than the drive: see the full-scale table for the real "
    "proportions.",
    "speedups": "Measured, synthetic weights, recorded routing: the named model's real shapes in "
    "bf16 with random weights, experts by `routing`: `shipped`, with what is guessed of them, as "
    "recorded on the project's small model of that geometry; any other is a trace of the real "
    "model, not shipped, without guesses (so nothing is prefetched or predicted) unless it has "
    "them. Decode at batch 1 after a prompt of 160 tokens and a short warm-up; each row a process "
    "of its own, rows interleaved over the rounds, page cache emptied before each that is capped "
    "(`cold`). Bytes, reads and arithmetic are the real model's, the text is not. "
    "`cap_share`: the cgroup's limit, page cache included, as a share of the model's size; empty "
    "where there was none. Slow systems stop after 12 seconds of decode, 3 or 4 for olmoe-quarter "
    "(`tokens`; how long each took, in order: `tokens-TABLE.csv` in the same folder). "
    "`flashmoe_speedup`: FlashMoE's token/s at the same cap over the row's, median of the rounds "
    "with their range. `bytes_per_token` by the engine's count, `device_bytes_per_token` by the "
    "kernel's. `hit_rate` of fiddler and daop is the share in their pinned tier. Roofline: 1 / "
    "max(needed bytes a token / drive, arithmetic), drive being fio's random reads of the store's "
    "own file just before or just after the run, whichever was faster (or the read limit), "
    "arithmetic the least that any row needed. "
    "`same_output`: tokens are the in-memory run's, or FlashMoE's where that does not fit; daop's "
    "differ on purpose (`tokens_differing`; of random weights, so its size means little).",
    "peers": "Measured, as the speedup table, but nothing forces the routing: the routers of the "
    "random weights were solved so that the prompt and what follows it are routed as recorded, "
    "whoever runs them. The same bf16 weights, as a store for flashmoe and as a memory-mapped GGUF "
    "file for llama-cpp (llama-cpp-python's, 2 threads). flashmoe guesses as the recorded routers "
    "did. `tokens_differing` are those that another system's arithmetic chose otherwise.",
    "quant": "Measured. `quant-quality`: the trained demo model on held-out documents of six "
    "kinds, windows of 256 tokens; `change` against plain transformers with bf16 experts; "
    "`same_as_held`: logits at the smallest budget are bit for bit those with all quantised "
    "experts in memory. `quant-MODEL`: as the speedup table, one system (flashmoe) on stores of "
    "the same random weights, the caps being shares of the bf16 model's size: fewer bytes an "
    "expert are also more slots. `over_bf16`: token/s over those of the bf16 store at that cap.",
    "timeline": "Measured: when, within one decoded token, pieces were read from the drive "
    "(demanded or guessed) and experts computed; `layer` is a whole experts module.",
    "quality": "Measured: what systems that change the model's output cost, on the trained demo "
    "model: perplexity of a module of Python's standard library, fed token by token after a "
    "prompt, and the share of positions at which the likeliest token differs from the model's. "
    "`slots`: the budget in experts a layer, half of which the system pins.",
    "packing": "Measured: `flashmoe pack` of the full-scale checkpoint in a process of its own; "
    "`page_cache_MB` is what of checkpoint and store lay in the page cache afterwards.",
    "faults": "Measured. `faults-reads`: a tiny model generates while system calls fail on "
    "purpose, one in 40: an I/O error, fewer bytes than asked for, a delay, a flipped bit, an "
    "early end of the file; every read is checked (`check_reads`). A run is right, refused in a "
    "sentence that names layer and expert, or worse; afterwards the same model must be right "
    "without faults. `faults-kills`: a pack is killed before one of the calls by which it changes "
    "the disk, each in turn.",
    "mutations": "Measured. Tiny checkpoints of nine families, damaged by a seed as directories "
    "are in the field, each loaded in place and packed: `equal` to transformers' own output bit "
    "for bit, `refused` in a sentence, `alike` where transformers' own forward fails, `more` where "
    "from_pretrained fails or draws weights at random and the engine goes on. The last two "
    "columns are faults.",
    "soak": "Measured: one process that loads, generates with, resizes and closes the demo model "
    "over and over, at random budgets and two policies.",
    "long_prompts": "Measured: a model of two of OLMoE's layers at full size with random weights, "
    "64 experts of top-8, a first prompt of 256 tokens and then this one, each row a process of "
    "its own. What the kernel counts as resident at most over what was resident before: weights "
    "(flashmoe: slots for half of the experts, all taken) do not count. `peak_beside`: of the "
    "whole prompt, attention included. `experts_beside`: within one experts module, most of which "
    "is the arithmetic of the expert that most tokens chose (`busiest_expert_tokens`), at once as "
    "in transformers' `eager` (`transformers`), and the result. `hidden`: the prompt's hidden "
    "state once.",
    "warm": "Measured, the demo model, 24 of 64 slots, another prompt of the same kind first, then "
    "this one: hit rates of the first token after the prompt and of the first 100, cold, and with "
    "`--warm`, which begins with the experts and the policy's state that the first prompt left.",
    "text": "Measured. Greedy text of the demo model, streamed from the store at two budgets, "
    "cold for each kind: `same_output` says whether every budget gave the tokens of plain "
    "transformers with everything resident; hit rates include the prompt, whose experts are new.",
}


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A directory on the results' file system, removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".scratch-", dir=folder) as made:
        yield Path(made)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """`name`.csv and `name`.md in `folder`; gives the table back."""
    frame = pd.DataFrame(rows)
    csv(folder, name, frame)
    (folder / f"{name}.md").write_text(f"{note(name)}\n\n{markdown(frame)}\n")
    return frame


def csv(folder: Path, name: str, frame: pd.DataFrame) -> None:
    """`name`.csv in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")


def note(name: str) -> str:
    """What a table's reader must know; `speedups-MODEL` and the like share their kind's note."""
    return NOTES[name.partition("-")[0]]


def tables(folder: Path) -> list[str]:
    """Names of the tables in `folder`, in the order of NOTES."""
    names = {path.stem for path in folder.glob("*.csv")}
    return [name for kind in NOTES for name in sorted(names) if name.partition("-")[0] == kind]


def markdown(frame: pd.DataFrame) -> str:
    """Units a person reads: MB for bytes, GB/s for bytes a second, empty for absent."""
    shown = pd.DataFrame()
    for column in frame.columns:
        values = frame[column]
        if column.endswith("bytes_per_second"):
            shown[column.replace("bytes_per_second", "GB/s")] = values / 1e9
        elif column.endswith("_bytes") or column == "bytes_per_token":
            shown[column.replace("_bytes", "_MB").replace("bytes_per", "MB_per")] = values / 1e6
        elif column == "text":
            shown[column] = values.map(_cell)
        else:
            shown[column] = values
    table: str = shown.to_markdown(index=False, floatfmt=".4g", missingval="")
    return table.replace("nan", "   ")


def _cell(text: object) -> str:
    return str(text).replace("\n", "⏎").replace("|", "\\|")


def provenance(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Keep the record of the run that made table(s) `name` in the folder's provenance.json."""
    path = folder / "provenance.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: record}, indent=1) + "\n")


def readme() -> None:
    """results/README.md from what lies under results/."""
    parts = [
        "# Results\n\nGenerated by `python -m harness`; do not edit. One folder a machine and "
        "profile. Each table says what was measured, replayed or simulated; `provenance.json` in "
        "each folder says on which machine, from which commit, with which versions.\n"
    ]
    for known in sorted(RESULTS.glob("*/provenance.json")):  # not where a run was stopped early
        folder = known.parent
        parts.append(f"## {folder.name}\n")
        records = json.loads(known.read_text())
        for name, record in records.items():
            machine = record["machine"]
            parts.append(
                f"- {name}: `{record['command']}`, {record['date']}, commit "
                f"{(record['commit'] or 'unknown')[:12]}"
                f"{' with uncommitted changes' if record['uncommitted_changes'] else ''}, "
                f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
                f"{machine['file_system']}, torch {record['versions']['torch']}"
            )
        parts.append("")
        for name in tables(folder):
            text = (folder / f"{name}.md").read_text()
            if name == "hit_rates":
                above, _, _ = text.partition("\n\n")
                text = f"{above} All rows: [hit_rates.md]({folder.name}/hit_rates.md).\n\n"
                text += gaps(pd.read_csv(folder / "hit_rates.csv"))
            elif name.startswith("timeline-"):
                text = f"{note(name)} Rows: [{name}.csv]({folder.name}/{name}.csv)."
            elif name == "gap_by_layer":
                text = f"{NOTES[name]} Rows: [gap_by_layer.md]({folder.name}/gap_by_layer.md)."
            parts.append(f"### {name.replace('_', ' ')}\n\n{text}")
            if (folder / f"{name}.png").exists():
                parts.append(f"![{name}]({folder.name}/{name}.png)\n")
    parts.append(paper())
    (RESULTS / "README.md").write_text("\n".join(parts))


SHOWN = ("lru", "lfu", "lfu-decay", "lfu-decay:64", "lfuda", "lfru", "lru-k", "slru", "arc",
         "s3-fifo", "sieve", "w-tinylfu", "lecar", "flashmoe-paper", "flashmoe-paper:vector",
         "learned", "static", "belady")  # fmt: skip


def gaps(frame: pd.DataFrame) -> str:
    """Two digests of a hit-rate table: gap closed by policy, hit rates by start."""
    cold = frame[(frame.start == "cold") & frame.capacity.between(0.25, 0.5)]
    cold = cold[cold.gap_closed.notna()].assign(case=cold.trace + ", " + cold.part)
    closed = cold.pivot_table(index="policy", columns="case", values="gap_closed", sort=False) * 100
    closed = closed.reindex([name for name in SHOWN if name in closed.index])
    half = frame[frame.capacity.isin((0.25, 0.5)) & frame.policy.isin(SHOWN)]
    half = half.assign(
        case=half.trace + ", " + half.part, at=(half.capacity * 100).map("{:.0f} %".format)
    )
    rates = half.pivot_table(
        index=["case", "at", "start"], columns="policy", values="hit_rate", sort=False
    )
    chosen = ["lru", "lfu", "lfu-decay", "s3-fifo", "learned", "belady"]
    rates = (rates[[name for name in chosen if name in rates]] * 100).reset_index()
    return (
        "Gap between LRU and Belady closed, %, cold, mean over 25, 37.5 and 50 % resident "
        "(static and belady see the future; `flashmoe-paper:vector` at 50 % only):\n\n"
        + closed.to_markdown(floatfmt=".1f", missingval="").replace("nan", "   ")
        + "\n\nHit rates, %, by start:\n\n"
        + rates.to_markdown(index=False, floatfmt=".1f", missingval="").replace("nan", "   ")
        + "\n"
    )


def paper() -> str:
    return f"""## The paper's figures

Of arXiv 2601.17063, beside ours. The paper's are of OLMoE-1B-7B itself on TriviaQA, with one small
cache, its size not given; ours of the demo model (OLMoE's 16 x 64, top-8, at 128 wide) on held-out
text of six kinds, event-atomic, every sequence cold. `flashmoe-paper` is the paper's policy from
notes, trained on other documents of the same kinds at 32 of 64 slots.

| figure | the paper | here, replayed |
|---|---|---|
| LRU and Belady at one capacity | 73 % and 86 % | {_near("belady", 0.86)} |
| gain where LRU is about 51 % | LRU +21, LeCaR +21, ARC +28, LFU +51 % | {_near("lru", 0.51)} |
| decode speed against Fiddler, DAOP, memory mapping | up to 2.6x (Qwen3-30B-A3B) | {_speeds()} |
"""


def _speeds() -> str:
    """FlashMoE's speedups in the full-size tables, at caps of 40 % and below."""
    said = []
    for path in sorted(RESULTS.glob("*-full-scale/speedups-*.csv")):
        frame = pd.read_csv(path)
        if "flashmoe_speedup" not in frame:
            continue
        tight = frame[frame.cap_share <= 0.4].groupby("system").flashmoe_speedup
        ranges = tight.agg(["min", "max"])
        over = ", ".join(
            f"{name} " + "-".join(dict.fromkeys(f"{ratio:.1f}" for ratio in ranges.loc[name])) + "x"
            for name in ("fiddler", "daop", "os-paging", "os-paging-willneed")
            if name in ranges.index
        )
        if over:
            machine = path.parent.name.removesuffix("-full-scale")
            said.append(f"{path.stem.removeprefix('speedups-')} on {machine}: {over}")
    return "measured at caps up to 40 %: " + "; ".join(said) if said else "not measured yet"


def _near(policy: str, rate: float) -> str:
    """Our figures at the capacity where `policy`'s hit rate is nearest to `rate`."""
    for path in sorted(RESULTS.glob("*/hit_rates.csv")):
        frame = pd.read_csv(path)
        cold = frame[(frame.trace == "demo") & (frame.start == "cold")]
        cold = cold[cold.part.str.startswith("unseen")].set_index("policy")
        if not len(cold):
            continue
        slots = cold.loc[policy].slots.iloc[(cold.loc[policy].hit_rate - rate).abs().argmin()]
        at = cold[cold.slots == slots].hit_rate
        said = f"{slots} of 64 slots: LRU {at.lru:.1%}, LFU {at.lfu:.1%}, Belady {at.belady:.1%}"
        for ours in ("learned", "flashmoe-paper"):
            if ours in at:
                over = ", ".join(
                    f"{name} {at[ours] / at[name] - 1:+.1%}"
                    for name in ("lru", "lecar", "arc", "lfu")
                )
                said += f"; {ours} {at[ours]:.1%} ({over})"
        return said
    return "not measured yet"
