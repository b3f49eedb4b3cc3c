"""The report in Markdown, out of the results alone."""

from __future__ import annotations

from typing import Any

from bench.goals import OURS, goals, peak, speed
from bench.machine import ceiling
from bench.results import Results
from bench.stats import median_of

Row = list[str]

PLOTS = ("throughput.png", "latency.png", "overload.png")
"""What `plots` draws."""


def render(results: Results, plots: list[str]) -> str:
    """Return the report; `plots` are names of pictures beside it."""
    data = results.data
    parts = ["# Benchmark", _setting(data), "## Goals", _goals(results), "## Tokens per second", _speeds(results)]
    parts += [f"![{name}]({name})" for name in plots]
    parts += ["## Latency in the closed loop", _latencies(results), "## Open loop", _open(results)]
    parts += ["## Memory and start", _memory(results), "## Fairness", _fairness(results)]
    parts += ["## The weights that were measured", _evaluation(data), "## How it was measured", _method(data)]
    return "\n\n".join(parts) + "\n"


def table(head: Row, rows: list[Row]) -> str:
    """Return a Markdown table; columns of figures are aligned to the right."""
    figures = [all(row[column][:1] in "–0123456789" for row in rows) for column in range(len(head))]
    lines = [head, ["---:" if right else "---" for right in figures], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def number(value: float | None, digits: int = 0) -> str:
    """Return a figure for people; a dash for none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def _setting(data: dict[str, Any]) -> str:
    machine, plan, found = data["machine"], data["plan"], data["ceilings"]
    memory = ", ".join(f"{found[f'{kind}_tops_{rows}']} TOP/s {kind} at {rows} rows"
                       for kind in ("int8", "bf16") for rows in (32, 512))  # fmt: skip
    return (
        f"{data['date']}. {machine['cpu']}, {machine['cores']} cores ({', '.join(machine['features'])}), "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}; load average before the run "
        f"{machine['load_average_before']}.\n\nSame model and prompts for all: 64 prompt tokens and 64 generated ones "
        f"a request, greedy, every prompt different. Medians over rounds ({plan['rounds']}), in which the servers take "
        f"turns.\n\nThe machine's own ceilings, measured in this run: {found['read_gb_per_s']} GB/s read, {memory}."
    )


def _goals(results: Results) -> str:
    rows = []
    for goal in goals(results):
        measured = "not measured" if goal.measured is None else f"{goal.measured:g} {goal.unit}".strip()
        rows.append([goal.what, goal.wanted, measured, "reached" if goal.reached else "**FAILED**", goal.reason])
    return table(["Goal", "Wanted", "Measured", "", "Remark"], rows)


def _levels(results: Results) -> list[int]:
    return list(results.data["plan"]["levels"])


def _title(results: Results, name: str) -> str:
    peer = results.data["peers"][name]
    return f"{peer['title']} {peer.get('version', '')}, {peer['precision']}".replace(" ,", ",")


def order(results: Results) -> list[str]:
    """Return ours first, then the peers in the order of the plan."""
    return [name for name in (OURS, *results.data["plan"]["peers"]) if name in results.data["peers"]]


def _speeds(results: Results) -> str:
    levels, data = _levels(results), results.data
    limits = {level: ceiling(data["ceilings"], data["model"], level, 64, 64) for level in levels}
    rows, notes = [], []
    for name in order(results):
        entry = data["peers"][name]
        row = [_title(results, name), entry.get("endpoint", "–")]
        for level in levels:
            value = speed(results, name, str(level))
            row.append("–" if value is None else f"{number(value)} ({value / limits[level]:.0%})")
        rows.append(row)
        for why in ("skipped", "failed"):
            if why in entry:
                notes.append(f"- {_title(results, name)} {why}: {entry[why]}")
    rows.append(["ceiling of this machine, int8", "", *[number(limits[level]) for level in levels]])
    head = ["Engine", "Asked by", *[f"{level} stream{'s' if level > 1 else ''}" for level in levels]]
    text = "Generated tokens/s, in brackets as a share of what the machine's memory and matrix units allow at int8.\n\n"
    return text + table(head, rows) + ("\n\n" + "\n".join(notes) if notes else "")


def _latencies(results: Results) -> str:
    rows = []
    for level in _levels(results):
        for name in order(results):
            cells = results.cells("closed", name, str(level))
            if not cells:
                continue
            figures = [
                number(median_of(cells, kind, percent), 1)
                for kind in ("ttft_ms", "itl_ms")
                for percent in ("p50", "p95", "p99")
            ]
            rows.append([_title(results, name), str(level), *figures, number(median_of(cells, "failed"))])
    head = [
        "Engine",
        "Streams",
        *[f"{kind} {p}" for kind in ("first token", "between tokens") for p in ("p50", "p95", "p99")],
    ]
    return "Milliseconds.\n\n" + table([*head, "Failed"], rows)


def _open(results: Results) -> str:
    rows = []
    for name in order(results):
        best = peak(results, name)
        for scenario in ("open", "overload"):
            for cell in sorted(results.cells(scenario, name), key=lambda cell: float(cell["level"])):
                good = cell["tokens_per_second"]
                rows.append([
                    _title(results, name), f"{cell['level']} × capacity", number(good),
                    "–" if best is None else f"{good / best:.0%}", number(cell["ttft_ms"]["p50"], 1),
                    number(cell["ttft_ms"]["p95"], 1), number(cell["ttft_ms"]["p99"], 1), number(cell["refused"]),
                    number(cell["refusal_ms"]["p99"], 1), number(cell["failed"]),
                ])  # fmt: skip
    text = (
        "Poisson arrivals; capacity is each engine's own best closed-loop figure. Time to first token in ms from when "
        "the request was due. An engine without bounded admission refuses nothing and lets everybody wait.\n\n"
    )
    head = [
        "Engine",
        "Rate",
        "Tokens/s",
        "Of its peak",
        "First token p50",
        "p95",
        "p99",
        "Refused",
        "Refusal p99",
        "Failed",
    ]
    return text + (table(head, rows) if rows else "Not measured.")


def _memory(results: Results) -> str:
    rows = []
    for name in order(results):
        cells = results.cells("ready", name)
        if not cells:
            continue
        memory = [number(median_of(cells, key)) for key in ("rss", "pss", "engine_rss")]
        filled = results.cells("memory", name)
        full = number(median_of(filled, "engine_peak")) if filled else "–"
        rows.append([_title(results, name), number(median_of(cells, "ready_seconds"), 1), *memory, full])
    head = ["Engine", "Ready, s", "All processes", "…shared pages once", "Engine process", "…32 slots of 2048 tokens"]
    text = (
        "Resident MiB once ready and before any request. Peers take memory for keys and values when they start, or as "
        "they grow, each as it does by default.\n\n"
    )
    return text + table(head, rows)


def _fairness(results: Results) -> str:
    cells = results.cells("fairness", OURS)
    if not cells:
        return "Not measured."
    rows = []
    for name in ("short", "long"):
        for key in ("alone", "flooded"):
            one = cells[0][name][key]
            first = [number(one["ttft_ms"][percent], 1) for percent in ("p50", "p95", "p99")]
            rows.append([f"{name}, {key}", *first, number(one["sent"]), number(one["refused"]), number(one["failed"])])
    text = (
        "A trickle of two requests a second of one class, alone and beside 64 streams of the other. Short: one "
        "question of 64 tokens. Long: six turns, 768 tokens. Time to first token in ms.\n\n"
    )
    return text + table(["Trickle", "p50", "p95", "p99", "Sent", "Refused", "Failed"], rows)


def _evaluation(data: dict[str, Any]) -> str:
    found = data.get("evaluation")
    if not found:
        return "`nioserve evaluate` was not run: the run did not come to it."
    verdict = "passed" if found["status"] == 0 else f"**FAILED** with status {found['status']}"
    text = f"`nioserve evaluate` of the very directory that was served: {verdict}."
    if "report" not in found:
        return f"{text}\n\n```\n{found['text']}\n```"
    report = found["report"]
    gates = [
        [
            check["what"],
            number(check["value"], 3),
            f"≥ {check['least']}" if check["least"] is not None else f"≤ {check['most']}",
            "passed" if check["passed"] else "**FAILED**",
        ]
        for check in report["checks"]
    ]
    kinds = ("relative_accuracy", "perplexity", "relative_perplexity", "agreement")
    sections = [
        [name, number(row["tokens"]), *[number(row[kind], 3) for kind in kinds]]
        for name, row in report["sections"].items()
    ]
    size = f"Weights {report['weight_bytes'] / 1e6:.1f} MB, peak memory {report['peak_bytes'] / 1e6:.0f} MB."
    head = [
        "Texts",
        "Tokens",
        "Next-token accuracy, share of fp32's",
        "Perplexity",
        "…share of fp32's",
        "Same top token",
    ]
    parts = [text, table(["Gate", "Measured", "Wanted", ""], gates), table(head, sections), size]
    return "\n\n".join(parts)


def _method(data: dict[str, Any]) -> str:
    client, plan = data["client"], data["plan"]
    steady, flat = client["steady"], client["flat_out"]
    settings = ", ".join(f"`{key}: {value}`" for key, value in sorted(data.get("settings", {}).items())) or "none"
    delay, cost = steady["delay_ms"], number(steady["client_microseconds_per_token"])
    return (
        f"The load generator against a server that computes nothing: at {number(steady['tokens_per_second'])} tokens/s "
        f"it sees a token {number(delay['p50'], 2)} ms after it was sent (p99 {number(delay['p99'], 2)} ms) and takes "
        f"{cost} µs of one core a token; flat out it takes {number(flat['tokens_per_second'])} tokens/s.\n\n"
        f"Closed loop: {plan['seconds']:g} s and at least one complete answer per stream are counted, after a ramp of "
        f"{plan['ramp']:g} s and the first complete answer. Libraries are driven in their own process, without HTTP, "
        f"which is in their favour. Ours: settings beyond the defaults: {settings}. Raw figures: `results.json`; the "
        "method: `server/bench/README.md`."
    )
