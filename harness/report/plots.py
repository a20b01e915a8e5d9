"""The pictures of tables, as PNG. Everything that a picture shows is in a CSV file."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})

from matplotlib import pyplot as plt  # noqa: E402

from harness.report import report  # noqa: E402

PARTS = {
    "wait_ms": ("waiting for reads", "#c44e52"),
    "experts_ms": ("expert arithmetic", "#4c72b0"),
    "rest_of_model_ms": ("rest of the model", "#8da0cb"),
    "python_ms": ("Python around the experts", "#ccb974"),
    "policy_ms": ("policy", "#55a868"),
}


def _save(figure: plt.Figure, folder: Path, name: str) -> None:
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=130)
    plt.close(figure)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:g} MiB" if size_bytes >= 1 << 20 else f"{size_bytes / 1024:g} KiB"


def ssd(rows: pd.DataFrame, reader: pd.DataFrame, folder: Path, name: str) -> None:
    """Bandwidth against block size, a line a depth; the engine's reader as crosses."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    fastest = max(rows.bytes_per_second.max(), reader.reader_bytes_per_second.max())
    for axis, pattern in zip(axes, ("sequential", "random"), strict=True):
        part = rows[rows.pattern == pattern]
        for depth, line in part.groupby("depth"):
            axis.plot(
                line.block_bytes, line.bytes_per_second / 1e9, "o-", label=f"fio, depth {depth}"
            )
        if pattern == "random":
            for depth, points in reader.groupby("depth"):
                axis.plot(
                    points.extent_bytes,
                    points.reader_bytes_per_second / 1e9,
                    "x",
                    markersize=9,
                    markeredgewidth=2,
                    label=f"engine's reader, depth {depth}",
                )
        sizes = [
            size for size in sorted(rows.block_bytes.unique()) if size != 12 << 20
        ]  # beside 16 MiB
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [_size(size) for size in sizes], rotation=45)
        axis.set(title=f"{pattern} direct reads", xlabel="block size")
        axis.set_ylim(0, 1.05e-9 * fastest)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("GB/s")
    _save(figure, folder, name)


POLICIES = {  # the plot's selection of the zoo; the tables have all
    "lru": "#8c8c8c",
    "lfu": "#64b5cd",
    "lfu-decay": "#4c72b0",
    "arc": "#ccb974",
    "s3-fifo": "#dd8452",
    "lecar": "#937860",
    "learned": "#c44e52",
    "belady": "black",
    "belady-bypass": "dimgrey",
}


def hit_rates(rows: pd.DataFrame, folder: Path, name: str) -> None:
    """Gain over LRU against capacity, a panel a trace, Belady as the ceiling."""
    cold = rows[rows.start == "cold"]
    cases = list(cold.groupby(["trace", "part"], sort=False))
    across = min(3, len(cases))
    figure, axes = plt.subplots(
        -(-len(cases) // across), across,
        figsize=(4.6 * across, 3.4 * -(-len(cases) // across)), squeeze=False,
    )  # fmt: skip
    for axis, ((trace, part), case) in zip(axes.flat, cases, strict=False):
        lru = case[case.policy == "lru"].set_index("capacity").hit_rate
        for policy, colour in POLICIES.items():
            line = case[case.policy == policy].set_index("capacity")
            if not len(line):
                continue
            style = {"belady": "--", "belady-bypass": ":"}.get(policy, "-")
            axis.plot(
                line.index * 100, (line.hit_rate - lru) * 100, style, marker="o", markersize=3,
                label=policy, color=colour, linewidth=2 if policy == "learned" else 1.2,
            )  # fmt: skip
        axis.set_title(f"{trace}, {part}", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    entries = axes.flat[0].get_legend_handles_labels()  # the last panel may lack a policy
    axes[0, -1].legend(*entries, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel("resident share of a layer's experts, %")
    figure.supylabel("hit rate above LRU's, points")
    _save(figure, folder, name)


def gap_by_layer(rows: pd.DataFrame, folder: Path, name: str) -> None:
    """How much of the way from LRU to Belady `learned` goes, layer by layer."""
    rows = rows[rows.capacity.isin((0.25, 0.5))]
    cases = list(rows.groupby(["trace", "part"], sort=False))
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(7, 1.9 * len(cases) + 0.6), squeeze=False, sharey=True
    )
    for axis, ((trace, part), case) in zip(axes.flat, cases, strict=True):
        for capacity, line in case.groupby("capacity"):
            axis.plot(
                line.layer, line.gap_closed * 100, marker=".", label=f"{capacity:.0%} resident"
            )
        axis.set_title(f"{trace}, {part}", fontsize=9)
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel("MoE layer")
    figure.supylabel("gap between LRU and Belady closed, %")
    _save(figure, folder, name)


def generation(rows: pd.DataFrame, folder: Path, name: str) -> None:
    """Where a token's time goes at each budget, with the roofline's time beside it."""
    rows = rows[rows.wait_ms.notna()].sort_values(["system", "slots"], ascending=[False, True])
    labels = [
        f"{row.system}\n{row.slots:.3g} slots\n{row.hit_rate:.0%} hits" for row in rows.itertuples()
    ]
    figure, axis = plt.subplots(figsize=(max(7.0, 1.6 * len(rows)), 4.5))
    bottom = pd.Series(0.0, index=rows.index)
    for column, (label, colour) in PARTS.items():
        axis.bar(labels, rows[column], bottom=bottom, label=label, color=colour, width=0.6)
        bottom += rows[column]
    floor = 1e3 / rows.roofline_tokens_per_second
    axis.plot(labels, floor, "k_", markersize=42, markeredgewidth=2, label="roofline")
    for label, height, rate in zip(labels, bottom, rows.tokens_per_second, strict=True):
        axis.annotate(f"{rate:.3g} token/s", (label, height), ha="center", va="bottom", fontsize=8)
    axis.set(ylabel="milliseconds a token", ylim=(0, 1.3 * bottom.max()))  # the legend above all
    axis.set_title("Demo model: where a token's time goes", fontsize=10)
    axis.legend(fontsize=8, markerscale=0.4, ncols=3, loc="upper right")
    _save(figure, folder, name)


def speedups(rows: pd.DataFrame, folder: Path, name: str) -> None:
    """Tokens a second against the cap, a line a system; at one cap only, a bar a system."""
    done = rows[rows.outcome == "ok"]
    capped, free = done[done.cap_share.notna()], done[done.cap_share.isna()]
    caps = sorted(capped.cap_share.unique())
    figure, axis = plt.subplots(figsize=(7.5, 4.5 if len(caps) > 1 else 3.2))
    model = rows.model.iloc[0]
    title = f"{model}'s shapes, synthetic weights, recorded routing"
    if len(caps) == 1:
        _bars(axis, pd.concat([capped, free]))
        title += f", cap {caps[0]:.0%} of the model"
    else:
        _lines(axis, capped, free)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    _save(figure, folder, name)


def _bars(axis: plt.Axes, rows: pd.DataFrame) -> None:
    labels = [
        row.system if pd.notna(row.cap_share) else f"{row.system}, no cap"
        for row in rows.itertuples()
    ]
    bars = axis.barh(labels, rows.tokens_per_second, color="#4c72b0")
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.plot(rows.roofline_tokens_per_second, labels, "k|", markersize=16, label="roofline")
    axis.invert_yaxis()
    axis.margins(x=0.1)  # for the last label
    axis.set_xlabel("decode, token/s")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # within, it hides a roofline


def _lines(axis: plt.Axes, capped: pd.DataFrame, free: pd.DataFrame) -> None:
    for system, line in capped.groupby("system", sort=False):
        spread = [
            line.tokens_per_second - line.tokens_per_second_min,
            line.tokens_per_second_max - line.tokens_per_second,
        ]
        ours = system == "flashmoe"
        axis.errorbar(
            line.cap_share * 100, line.tokens_per_second, spread, marker="o", capsize=3,
            label=system, linewidth=2.5 if ours else 1.2, zorder=3 if ours else 2,
        )  # fmt: skip
        if ours:
            roofline = line.roofline_tokens_per_second
            axis.plot(line.cap_share * 100, roofline, "k_", markersize=18, label="its roofline")
    for rate in free.tokens_per_second:
        axis.axhline(rate, color="grey", linestyle=":", label="in-memory, no cap")
    axis.set(xlabel="memory cap, % of the model's size", ylabel="decode, token/s", ylim=(0, None))
    axis.legend(fontsize=8)


SPANS = {
    "demand": ("reading what is needed", "#c44e52"),
    "guess": ("reading what is guessed", "#dd8452"),
    "experts": ("computing experts", "#4c72b0"),
    "rest": ("rest of the model", "#8da0cb"),
}


def timeline(rows: pd.DataFrame, folder: Path, name: str) -> None:
    """One token of each system: the drive above, the processor below."""
    systems = list(dict.fromkeys(rows.system))
    figure, axes = plt.subplots(len(systems), 1, figsize=(11, 1.9 * len(systems)), sharex=True)
    for axis, system in zip(axes, systems, strict=True):
        events = rows[rows.system == system]
        end = events.end_ms.max()
        layers = events[events.what == "layer"].sort_values("start_ms")
        outside = zip([0.0, *layers.end_ms], [*layers.start_ms, end], strict=True)
        spans = {
            what: [(s, e - s) for s, e in zip(part.start_ms, part.end_ms, strict=True)]
            for what, part in events.groupby("what")
        }
        spans["rest"] = [(s, max(0.0, e - s)) for s, e in outside]
        for what, (label, colour) in SPANS.items():
            place = (1.1, 0.8) if what in ("demand", "guess") else (0.1, 0.8)
            axis.broken_barh(spans.get(what, []), place, color=colour, label=label, linewidth=0)
        axis.set_yticks([0.5, 1.5], ["processor", "drive"])
        axis.set_title(f"{system}: one token, {end:.0f} ms", fontsize=9, loc="left")
    axes[0].legend(fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1.05))
    axes[-1].set_xlabel("milliseconds")
    _save(figure, folder, name)


PLOTS = {
    "hit_rates": hit_rates,
    "gap_by_layer": gap_by_layer,
    "generation": generation,
    "speedups": speedups,
    "peers": speedups,
    "timeline": timeline,
}


def draw(folder: Path, name: str, out: Path) -> bool:
    """Draw table `name` of `folder` as `name`.png in `out`; False where it has no picture."""
    kind, rows = report.kind_of(name), report.read(folder, name)
    if kind == "ssd":
        ssd(rows, report.read(folder, "reader"), out, name)
    elif kind in PLOTS:
        PLOTS[kind](rows, out, name)
    else:
        return False
    return True
