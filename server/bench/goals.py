"""What must be reached, each goal with its measured figure. A goal that could not be measured is not reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.results import Results
from bench.stats import median_of

OURS = "nioserve"


@dataclass(frozen=True, slots=True)
class Goal:
    """`measured` is None where there is nothing to judge; `reason` then says why."""

    what: str
    wanted: str
    measured: float | None
    unit: str
    reached: bool
    reason: str = ""


def speed(results: Results, peer: str, level: str) -> float | None:
    """Return the median tokens/s of a peer in the closed loop."""
    return median_of(results.cells("closed", peer, level), "tokens_per_second")


def peak(results: Results, peer: str) -> float | None:
    """Return a peer's best median tokens/s over all levels."""
    levels = {cell["level"] for cell in results.cells("closed", peer)}
    return max((value for level in levels if (value := speed(results, peer, level))), default=None)


def goals(results: Results) -> list[Goal]:
    """Return all goals in the order of the table."""
    found = [
        _ratio(results, 32, ("vllm",), 3.0),
        _ratio(results, 32, ("openvino",), 2.0),
        _ratio(results, 8, ("vllm",), 2.5),
        _ratio(results, 8, ("openvino",), 1.5),
        _ratio(results, 1, ("llama.cpp", "vllm", "openvino"), 1.5),
        _at_most("ready from a quantised directory", 15, "s", median_of(results.cells("ready", OURS), "ready_seconds")),
        _at_most("engine's memory before requests", 650, "MB", _megabytes(results.cells("ready", OURS), "engine_rss")),
    ]
    filled = results.cells("memory", OURS)
    int8 = any("int8" in str(value) for key, value in results.data.get("settings", {}).items() if "kv_cache" in key)
    limit, kind = (1400, "int8") if int8 else (2200, "bf16")
    full = bool(filled) and filled[0].get("slots_filled") == 32
    found.append(
        _at_most(
            f"engine's memory, 32 slots of 2048 tokens, {kind} keys and values", limit, "MB",
            _megabytes(filled, "engine_peak") if full else None, "the slots were not filled",
        )
    )  # fmt: skip
    found += _overload(results) + _fairness(results)
    status = results.data.get("evaluation", {}).get("status")
    reason = "not run" if status is None else ""
    found.append(Goal("`nioserve evaluate` of the same weights: exit status", "= 0", status, "", status == 0, reason))
    return found


def _ratio(results: Results, streams: int, peers: tuple[str, ...], wanted: float) -> Goal:
    level = str(streams)
    ours = speed(results, OURS, level)
    theirs = {peer: value for peer in peers if (value := speed(results, peer, level))}
    name = " or ".join(peers) if len(peers) == 1 else f"the fastest of {', '.join(peers)}"
    what = f"tokens/s at {streams} stream{'s' if streams > 1 else ''}, beside {name}"
    missing = [peer for peer in (OURS, *peers) if peer not in theirs and (peer != OURS or not ours)]
    if not ours or not theirs:
        return Goal(what, f"≥ {wanted} ×", None, "×", False, f"not measured: {', '.join(missing)}")
    ratio = ours / max(theirs.values())
    reason = f"without {', '.join(missing)}" if missing else ""
    return Goal(what, f"≥ {wanted} ×", round(ratio, 2), "×", ratio >= wanted and not missing, reason)


def _at_most(what: str, limit: float, unit: str, value: float | None, reason: str = "not measured") -> Goal:
    if value is None:
        return Goal(what, f"≤ {limit:g} {unit}", None, unit, False, reason)
    return Goal(what, f"≤ {limit:g} {unit}", round(value, 2), unit, value <= limit)


def _megabytes(cells: list[dict[str, Any]], key: str) -> float | None:
    """Return a median in MB (10^6 bytes); cells hold MiB."""
    value = median_of(cells, key)
    return None if value is None else value * 2**20 / 1e6


def _overload(results: Results) -> list[Goal]:
    cells, best = results.cells("overload", OURS), peak(results, OURS)
    if not cells or best is None:
        return [Goal("open loop at 5 × capacity", "no crash, goodput, quick refusals", None, "", False, "not measured")]
    cell = cells[0]
    refused, polite = cell["refused"], cell["refused_with_retry_after"]
    crashed = cell["processes_lost"] + (not cell["alive"])
    good = cell["tokens_per_second"] / best
    right = refused > 0 and polite == refused and cell["refused_statuses"] == [503]
    share = round(polite / refused, 3) if refused else None
    title = f"5 × capacity for {cell['seconds']:.0f} s: "
    failed, why = cell["failed"], cell["first_failure"][:120]
    impolite = "" if right else f"statuses {cell['refused_statuses']}, {polite} of {refused} with Retry-After"
    wait = cell["refusal_ms"]["p99"]
    return [
        Goal(title + "processes lost", "= 0", crashed, "", crashed == 0),
        Goal(title + "requests that failed otherwise", "= 0", failed, "", failed == 0, why),
        Goal(title + "goodput, share of the peak", "≥ 0.9", round(good, 2), "", good >= 0.9),
        _at_most(title + "time to a refusal's status, p99", 100, "ms", wait, "nothing was refused"),
        Goal(title + "refusals that are 503 with Retry-After", "= 1", share, "", right, impolite),
    ]


def _fairness(results: Results) -> list[Goal]:
    cells = results.cells("fairness", OURS)
    found = []
    for name, other in (("short", "long"), ("long", "short")):
        what = f"p95 time to first token of {name} conversations in a flood of {other} ones, beside alone"
        flooded, alone = (cells[0][name][key]["ttft_ms"]["p95"] if cells else None for key in ("flooded", "alone"))
        if not flooded or not alone:
            found.append(
                Goal(what, "≤ 2 ×", None, "×", False, "no answer under the flood" if cells else "not measured")
            )
            continue
        ratio = flooded / alone
        lost = cells[0][name]["flooded"]["refused"] + cells[0][name]["flooded"]["failed"]
        reason = f"{alone:.0f} ms alone, {flooded:.0f} ms flooded" + (f"; {lost} refused or failed" if lost else "")
        found.append(Goal(what, "≤ 2 ×", round(ratio, 2), "×", ratio <= 2 and not lost, reason))
    return found
