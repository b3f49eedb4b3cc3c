"""Comparing a converted model with its source: figures, gates, a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nioserve.evaluate.measure import Measurement, Section


@dataclass(frozen=True, slots=True)
class Gates:
    """What a conversion may cost, as shares of the reference's figures."""

    min_accuracy: float = 0.99
    max_perplexity: float = 1.02
    min_agreement: float = 0.94
    max_weight_bytes: float = 0.51


@dataclass(frozen=True, slots=True)
class Figures:
    """One section of the texts. The figures against a reference are None without one."""

    tokens: int
    accuracy: float  # how often the most likely token came
    perplexity: float
    relative_accuracy: float | None  # accuracy over the reference's
    relative_perplexity: float | None  # perplexity over the reference's
    agreement: float | None  # how often both have the same most likely token


@dataclass(frozen=True, slots=True)
class Check:
    """One gate: a figure that must not be below `least`, or not above `most`."""

    what: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def passed(self) -> bool:
        """Return whether the figure is there and within its bounds."""
        if self.value is None or not math.isfinite(self.value):
            return False
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of an evaluation, by section, and its gates. `texts` is English prose and chats together."""

    model: str
    reference: str | None
    sections: dict[str, Figures]
    checks: list[Check]
    weight_bytes: int
    peak_bytes: int
    reference_peak_bytes: int | None

    @property
    def passed(self) -> bool:
        """Return whether all gates passed."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {**asdict(self), "checks": checks, "passed": self.passed}

    def as_text(self) -> str:
        """Return a table of the sections and one of the gates."""
        against = f"against {self.reference}" if self.reference else "without a reference"
        lines = [f"{self.model} {against}", "", f"{'':10}" + "".join(f"{name:>14}" for name in _COLUMNS)]
        for name, row in self.sections.items():
            cells = [str(row.tokens), _percent(row.accuracy), f"{row.perplexity:.2f}", _percent(row.relative_accuracy),
                     _percent(row.relative_perplexity), _percent(row.agreement)]  # fmt: skip
            lines.append(f"{name:10}" + "".join(f"{cell:>14}" for cell in cells))
        lines += ["", f"Weights {self.weight_bytes / 1e6:.1f} MB, peak memory {self.peak_bytes / 1e6:.0f} MB"]
        if self.reference_peak_bytes is not None:
            lines[-1] += f" (reference {self.reference_peak_bytes / 1e6:.0f} MB)"
        lines.append("")
        for check in self.checks:
            bound = f"at least {check.least:.1%}" if check.least is not None else f"at most {check.most:.1%}"
            lines.append(f"{'pass' if check.passed else 'FAIL'}  {check.what}: {_percent(check.value)} ({bound})")
        if self.reference is None:
            lines.append("Not measured without --reference: what the conversion cost. Name the model it was made from.")
        return "\n".join(lines)


_COLUMNS = ("tokens", "accuracy", "perplexity", "rel. accuracy", "rel. perpl.", "agreement")


def compare(model: Measurement, reference: Measurement | None, gates: Gates) -> Report:
    """Judge a model; without a reference the gates that need one fail, because nothing was shown."""
    sections = _with_joined(model.sections)
    bases = _with_joined(reference.sections) if reference else {}
    figures = {name: _figures(section, bases.get(name)) for name, section in sections.items()}
    texts, answers = figures["texts"], figures["answers"]
    checks = [
        Check("next-token accuracy on texts, share of the reference's", texts.relative_accuracy, gates.min_accuracy),
        Check("perplexity of texts, share of the reference's", texts.relative_perplexity, None, gates.max_perplexity),
        Check("agreement of the top token on texts", texts.agreement, gates.min_agreement),
        Check("perplexity of answers, share of the reference's", answers.relative_perplexity, None,
              gates.max_perplexity),
        Check("agreement of the top token on answers", answers.agreement, gates.min_agreement),
        Check("weight bytes, share of fp16's", model.weight_bytes / model.fp16_bytes, None, gates.max_weight_bytes),
    ]  # fmt: skip
    return Report(
        model.name,
        reference.name if reference else None,
        figures,
        checks,
        model.weight_bytes,
        model.peak_bytes,
        reference.peak_bytes if reference else None,
    )


def _with_joined(sections: dict[str, Section]) -> dict[str, Section]:
    return {"texts": _join([sections[name] for name in ("english", "chats") if name in sections]), **sections}


def _join(sections: Sequence[Section]) -> Section:
    return Section(
        [token for section in sections for token in section.targets],
        [token for section in sections for token in section.tops],
        [value for section in sections for value in section.log_probabilities],
    )


def _figures(section: Section, base: Section | None) -> Figures:
    accuracy, perplexity = _accuracy(section), _perplexity(section)
    if base is None:
        return Figures(len(section.targets), accuracy, perplexity, None, None, None)
    right = _accuracy(base)
    return Figures(
        len(section.targets),
        accuracy,
        perplexity,
        accuracy / right if right else None,
        perplexity / _perplexity(base),
        _share(section.tops, base.tops),
    )


def _accuracy(section: Section) -> float:
    return _share(section.tops, section.targets)


def _perplexity(section: Section) -> float:
    count = len(section.targets)
    return math.exp(-sum(section.log_probabilities) / count) if count else math.nan


def _share(first: Sequence[int], second: Sequence[int]) -> float:
    return sum(map(int.__eq__, first, second)) / len(first) if first else math.nan


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
