"""The figures of arXiv 2601.17063 beside ours."""

from __future__ import annotations

import pandas as pd

from harness.report import report


def section() -> str:
    """Markdown, from what lies under results/."""
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


def _near(policy: str, rate: float) -> str:
    """Our figures at the capacity where `policy`'s hit rate is nearest to `rate`."""
    for path in sorted(report.RESULTS.glob("*/hit_rates.csv")):
        frame = pd.read_csv(path)
        cold = frame[(frame.trace == "demo") & (frame.start == "cold")]
        cold = cold[cold.part.str.startswith("unseen")].set_index("policy")
        if not len(cold):
            continue
        slots = cold.loc[policy].slots.iloc[(cold.loc[policy].hit_rate - rate).abs().argmin()]
        at = cold[cold.slots == slots].hit_rate
        text = f"{slots} of 64 slots: LRU {at.lru:.1%}, LFU {at.lfu:.1%}, Belady {at.belady:.1%}"
        for ours in ("learned", "flashmoe-paper"):
            if ours in at:
                over = ", ".join(
                    f"{name} {at[ours] / at[name] - 1:+.1%}"
                    for name in ("lru", "lecar", "arc", "lfu")
                )
                text += f"; {ours} {at[ours]:.1%} ({over})"
        return text
    return "not measured yet"
