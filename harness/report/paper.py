"""The figures of arXiv 2601.17063 beside ours."""

from __future__ import annotations

import pandas as pd

from harness.report import report


def section() -> str:
    """Markdown, from what lies under results/."""
    return f"""## The paper's figures

Of arXiv 2601.17063, beside ours. The paper's are of OLMoE-1B-7B and Qwen3-30B-A3B on TriviaQA. Ours
are replayed on the routing of the demo model (OLMoE's 16 x 64, top-8, at 128 wide), gpt-oss-20b and
DeepSeek-V2-Lite, or measured in the full-size tables. `here` is the range over all cases: traces,
replays and readings of the paper's network. The table `paper` says which cases hold.

| figure | the paper | here | verdict | cases that hold |
|---|---|---|---|---|
{_figures()}| decode speed against Fiddler, DAOP, mmap | up to 2.6x (Qwen3) | {_speeds()} | | |
"""


def _figures() -> str:
    """The rows of the fullest table `paper` under results/."""
    tables = [pd.read_csv(path) for path in sorted(report.RESULTS.glob("*/paper.csv"))]
    if not tables:
        return ""
    fullest = max(tables, key=lambda table: table.cases.sum())
    lines = []
    for row in fullest.itertuples():
        here = f"{row.here_least:.3g} to {row.here_most:.3g}" if row.cases else ""
        lines.append(
            f"| {row.figure} | {row.the_paper} | {here} | {row.verdict} "
            f"| {row.cases_that_hold} of {row.cases} |\n"
        )
    return "".join(lines)


def _speeds() -> str:
    """FlashMoE's speedups in the full-size tables, at caps of 40 % and below."""
    parts = []
    for path in sorted(report.RESULTS.glob("*-full-scale/speedups-*.csv")):
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
            parts.append(f"{path.stem.removeprefix('speedups-')} on {machine}: {over}")
    return "measured at caps up to 40 %: " + "; ".join(parts) if parts else "not measured yet"
