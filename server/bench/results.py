"""The results: one JSON file, written after each measurement, so that a run can go on where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 1


class ResultsError(Exception):
    """A file that cannot be used; the message says how to mend it."""


class Results:
    """Cells by scenario, round, peer and level, and what was found once per run."""

    def __init__(self, file: Path, data: dict[str, Any] | None = None) -> None:
        self._file = file
        self.data: dict[str, Any] = data or {"format": FORMAT, "peers": {}, "cells": []}

    @classmethod
    def load(cls, file: Path) -> Results:
        """Read a file; ResultsError when it is none of ours."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"{file}: cannot be read: {error.strerror}; run `python -m bench run` first") from error
        except ValueError as error:
            raise ResultsError(f"{file}: is not JSON; remove it and run the benchmark again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ResultsError(f"{file}: is not of format {FORMAT}; remove it and run the benchmark again")
        return cls(file, data)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        work = self._file.with_suffix(".new")
        work.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        work.rename(self._file)

    def put(self, scenario: str, peer: str, level: str, number: int, figures: dict[str, Any]) -> None:
        """Keep a cell and write the file."""
        where = {"scenario": scenario, "peer": peer, "level": level, "round": number}
        self.data["cells"] = [cell for cell in self.data["cells"] if any(cell[key] != where[key] for key in where)]
        self.data["cells"].append({**where, **figures})
        self.save()

    def has(self, scenario: str, peer: str, level: str, number: int) -> bool:
        """Return whether a cell is there."""
        return any(cell["level"] == level and cell["round"] == number for cell in self.cells(scenario, peer))

    def cells(self, scenario: str, peer: str, level: str | None = None) -> list[dict[str, Any]]:
        """Return the rounds' cells."""
        return [
            cell
            for cell in self.data["cells"]
            if cell["scenario"] == scenario and cell["peer"] == peer and level in (None, cell["level"])
        ]

    def forget(self, peer: str) -> None:
        """Drop a peer's cells, so that they are measured again."""
        self.data["cells"] = [cell for cell in self.data["cells"] if cell["peer"] != peer]
        self.data["peers"].pop(peer, None)
