"""The pictures beside the tables, each as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "flashmoe"  # the same figure gives the same file
mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})

from matplotlib import pyplot as plt  # noqa: E402

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
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:g} MiB" if size_bytes >= 1 << 20 else f"{size_bytes / 1024:g} KiB"


def ssd(rows: pd.DataFrame, reader: pd.DataFrame, folder: Path) -> None:
    """Bandwidth against block size, a line a depth; the engine's reader as crosses."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
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
        axis.set_ylim(0, 1.05e-9 * rows.bytes_per_second.max())
        axis.legend(fontsize=8)
    axes[0].set_ylabel("GB/s")
    _save(figure, folder, "ssd")


def hit_rates(rows: pd.DataFrame, folder: Path) -> None:
    """Hit rate against capacity, a panel a kind of text, Belady as the ceiling."""
    cold = rows[rows.start == "cold"]
    kinds = list(cold.text.unique())
    figure, axes = plt.subplots(
        2, -(-len(kinds) // 2), figsize=(12, 6), sharey=True, sharex=True, squeeze=False
    )
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for policy, line in cold[cold.text == kind].groupby("policy"):
            style = {"color": "black", "linestyle": "--"} if policy == "belady" else {}
            axis.plot(line.capacity * 100, line.hit_rate * 100, marker="o", label=policy, **style)
            if kind == "all":
                axis.fill_between(
                    line.capacity * 100, line.low * 100, line.high * 100, alpha=0.15, **style
                )
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(kinds) :]:
        axis.axis("off")
    axes.flat[0].legend()
    figure.supxlabel("resident share of a layer's experts, %")
    figure.supylabel("hit rate, %")
    _save(figure, folder, "hit_rates")


def generation(rows: pd.DataFrame, folder: Path, name: str, title: str) -> None:
    """Where a token's time goes at each budget, with the roofline's time beside it."""
    rows = rows[rows.wait_ms.notna()].sort_values(["system", "slots"], ascending=[False, True])
    labels = [
        f"{row.system}\n{row.slots:.0f} slots\n{row.hit_rate:.0%} hits" for row in rows.itertuples()
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
    axis.set(ylabel="milliseconds a token")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, markerscale=0.4)
    _save(figure, folder, name)
