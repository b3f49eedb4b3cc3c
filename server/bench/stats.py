"""From records to figures. Only what fell into the window counts; tokens are counted by the client.

A request's tokens are those the server reported as its usage, spread evenly over the pieces of text that came, so a
server that packs several tokens into a piece (guessed ahead, or held back while a character was incomplete) is counted
right. A request that was cut off at the end of the load counts as many tokens a piece as the complete ones had.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

from bench.course import Record

PERCENTILES = (50, 95, 99)
REFUSED = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile by linear interpolation; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def milliseconds(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return percentiles in ms, and how many values they are of."""
    found: dict[str, float | None] = {}
    for percent in PERCENTILES:
        value = percentile(seconds, percent)
        found[f"p{percent}"] = None if value is None else round(value * 1000, 2)
    found["count"] = len(seconds)
    return found


def summarise(records: list[Record], window: tuple[float, float]) -> dict[str, Any]:
    """Return the figures of one load: tokens/s, latencies in ms, and what went wrong, with counts."""
    begin, end = window
    complete = [record for record in records if record.finished and record.status == HTTPStatus.OK and not record.error]
    pieces = sum(len(record.times) for record in complete)
    usual = sum(record.completion_tokens for record in complete) / pieces if pieces else 1.0
    tokens, first, between, whole = 0.0, [], [], []
    for record in records:
        times = record.times
        each = record.completion_tokens / len(times) if record.finished and times else usual
        tokens += each * sum(begin <= moment < end for moment in times)
        if times and begin <= times[0] < end:
            first.append(times[0] - record.start)
        between += [after - before for before, after in itertools.pairwise(times) if begin <= after < end]
        if record.finished and not record.error and begin <= record.finished < end:
            whole.append(record.finished - record.start)
    refused = [record for record in records if record.status in REFUSED]
    wrong = [record for record in records if record.error and record not in refused]
    return {
        "seconds": round(end - begin, 3),
        "tokens_per_second": round(tokens / (end - begin), 2) if end > begin else 0.0,
        "requests_per_second": round(len(whole) / (end - begin), 3) if end > begin else 0.0,
        "ttft_ms": milliseconds(first),
        "itl_ms": milliseconds(between),
        "e2e_ms": milliseconds(whole),
        "tokens_per_piece": round(usual, 3),
        "prompt_tokens": sorted({record.prompt_tokens for record in complete}),
        "completion_tokens": sorted({record.completion_tokens for record in complete}),
        "sent": len(records),
        "complete": len(complete),
        "refused": len(refused),
        "refused_statuses": sorted({record.status for record in refused}),
        "refused_with_retry_after": sum(record.retry_after for record in refused),
        "refusal_ms": milliseconds([record.answered - record.start for record in refused if record.answered]),
        "failed": len(wrong),
        "first_failure": next((record.error for record in wrong), ""),
    }


def median_of(summaries: Iterable[dict[str, Any]], *path: str) -> float | None:
    """Return the median over rounds of the figure at `path`; None when no round has it."""
    values = []
    for summary in summaries:
        value: Any = summary
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            values.append(float(value))
    return statistics.median(values) if values else None
