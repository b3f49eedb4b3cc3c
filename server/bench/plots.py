"""The pictures, out of the results alone. Run by the `plots` environment, which has matplotlib.

usage: python -m bench.plots RESULTS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found]  # only in the environment `plots`

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # type: ignore[import-not-found]
from matplotlib import ticker

from bench.goals import peak
from bench.machine import ceiling
from bench.report import PLOTS, order
from bench.results import Results
from bench.stats import median_of

# Okabe and Ito's palette, which colour-blind people can tell apart; markers differ too.
COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def _label(results: Results, name: str) -> str:
    peer = results.data["peers"][name]
    return f"{peer['title']}, {peer['precision']}" + ("" if peer["over_http"] else " (library, no HTTP)")


def _style(number: int) -> dict[str, Any]:
    style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 6}
    return {**style, "linewidth": 2.6 if number == 0 else 1.6}


def _series(results: Results, name: str, *path: str) -> tuple[list[int], list[float]]:
    points = [
        (level, value)
        for level in results.data["plan"]["levels"]
        if (value := median_of(results.cells("closed", name, str(level)), *path))  # nothing at all has no logarithm
    ]
    return [level for level, _ in points], [value for _, value in points]


def _streams(axes: Any, levels: list[int]) -> None:  # noqa: ANN401  matplotlib's axes are untyped
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set_xlabel("streams at a time")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_log(axes: Any) -> None:  # noqa: ANN401
    """Scale the upright axis by logarithms, with numbers that people read: 1, 2, 5, 10, …"""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def throughput(results: Results, file: Path) -> None:
    """Draw tokens/s over streams, with each round as a small point and the machine's ceiling."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    data, levels = results.data, results.data["plan"]["levels"]
    for number, name in enumerate(order(results)):
        across, values = _series(results, name, "tokens_per_second")
        if not values:
            continue
        axes.plot(across, values, label=_label(results, name), **_style(number))
        for cell in results.cells("closed", name):
            axes.plot(
                int(cell["level"]), cell["tokens_per_second"], ".", color=COLOURS[number % len(COLOURS)], alpha=0.45
            )
        axes.annotate(f"{values[-1]:,.0f}", (across[-1], values[-1]), (8, -3), textcoords="offset points", fontsize=9)
    limits = [ceiling(data["ceilings"], data["model"], level, 64, 64) for level in levels]
    axes.plot(levels, limits, "--", color="#777777", label="ceiling of this machine, int8")
    _streams(axes, levels)
    _plain_log(axes)
    axes.set_ylabel("generated tokens/s, all streams together")
    axes.set_title("Throughput, 64 prompt and 64 generated tokens (medians; dots are rounds)", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def latency(results: Results, file: Path) -> None:
    """Draw time to first token and between tokens over streams: median as a line, p95 dotted."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    parts = (("ttft_ms", "time to first token"), ("itl_ms", "time between tokens"))
    for axes, (kind, title) in zip(both, parts, strict=True):
        for number, name in enumerate(order(results)):
            across, values = _series(results, name, kind, "p50")
            if not values:
                continue
            label = _label(results, name) if kind == "ttft_ms" else None
            axes.plot(across, values, label=label, **_style(number))
            across, values = _series(results, name, kind, "p95")
            axes.plot(across, values, ":", color=COLOURS[number % len(COLOURS)], linewidth=1.4)
        _streams(axes, results.data["plan"]["levels"])
        _plain_log(axes)
        axes.set_ylabel("milliseconds")
        axes.set_title(f"{title}: median (line), p95 (dotted)", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def overload(results: Results, file: Path) -> None:
    """Draw goodput as a share of each engine's peak, and p95 time to first token, over the offered rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for number, name in enumerate(order(results)):
        cells = [*results.cells("open", name), *results.cells("overload", name)]
        best = peak(results, name)
        if not cells or not best:
            continue
        cells.sort(key=lambda cell: float(cell["level"]))
        across = [float(cell["level"]) for cell in cells]
        left.plot(
            across, [cell["tokens_per_second"] / best for cell in cells], label=_label(results, name), **_style(number)
        )
        seen = [
            (rate, cell["ttft_ms"]["p95"]) for rate, cell in zip(across, cells, strict=True) if cell["ttft_ms"]["p95"]
        ]
        right.plot([rate for rate, _ in seen], [value for _, value in seen], **_style(number))
    left.axhline(0.9, color="#777777", linestyle="--", linewidth=1)
    left.annotate("goal: 90 % at 5 ×", (1.1, 0.905), fontsize=9, color="#555555", va="bottom")
    left.set(ylabel="goodput, share of the engine's own peak", ylim=(0, None))
    right.set(ylabel="p95 time to first token, milliseconds")
    _plain_log(right)
    for axes in (left, right):
        axes.set_xlabel("offered requests, as a multiple of capacity")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("Open loop, Poisson arrivals", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    found, out = Results.load(Path(sys.argv[1])), Path(sys.argv[2])
    for draw, name in zip((throughput, latency, overload), PLOTS, strict=True):
        draw(found, out / name)
