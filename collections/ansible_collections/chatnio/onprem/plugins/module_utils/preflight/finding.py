# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""One thing to mend, and the table of them that an operator reads."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

# A cell wider than this (an error message, a list of models) doesn't widen its column for all the others.
WIDEST_COLUMN = 48


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, what is needed instead and how to get there. One that isn't fatal is a warning."""

    host: str
    subject: str
    found: str
    needed: str
    mend: str
    fatal: bool = True


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one most likely means, or None where no name is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return the question to ask about a mistyped name, or None where no known name is close."""
    return f"did you mean {match}?" if (match := closest(name, known)) else None


def format_report(findings: Iterable[Finding], label: Callable[[Collection[str]], str] = ", ".join) -> str:
    """Return the findings as one aligned block, under a line that counts them.

    What several hosts have in common takes one line; `label` names these hosts.
    """
    findings = _merge(findings, label)
    rows = [
        (
            finding.host,
            finding.subject if finding.fatal else f"{finding.subject} (warning)",
            f"found: {finding.found}",
            f"needed: {finding.needed}",
            f"mend: {finding.mend}",
        )
        for finding in findings
    ]
    widths = [
        max((len(cell) for cell in column if len(cell) <= WIDEST_COLUMN), default=0)
        for column in zip(*rows, strict=True)
    ]
    lines = [
        "  " + "    ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([f"preflight: {_count(findings)}, nothing was changed", *lines])


def _merge(findings: Iterable[Finding], label: Callable[[Collection[str]], str]) -> list[Finding]:
    hosts: dict[Finding, list[str]] = {}
    for finding in findings:
        hosts.setdefault(replace(finding, host=""), []).append(finding.host)
    return [replace(finding, host=label(names)) for finding, names in hosts.items()]


def _count(findings: Sequence[Finding]) -> str:
    fatal = sum(finding.fatal for finding in findings)
    parts = [_plural(fatal, "finding")] if fatal or not findings else []
    if warnings := len(findings) - fatal:
        parts.append(_plural(warnings, "warning"))
    return " and ".join(parts)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
