"""Write the variable table of every role's README from the role's meta/argument_specs.yml.

usage: role_docs.py [--check] [ROLES]

The table stands between two comments, `<!-- variables -->` and `<!-- /variables -->`. A default that is no plain value
comes from the role's defaults/main.yml. With --check nothing is written: stale READMEs are named, with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

BEGIN, END = "<!-- variables -->", "<!-- /variables -->"
ROLES = Path(__file__).resolve().parents[1] / "roles"
HEAD = "| Variable | Type | Default | Meaning |\n|---|---|---|---|"
# A longer default is looked up where it is.
LONGEST = 60


class DocsError(Exception):
    """A README that can't be written; the message says which and why."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a file; an empty one where there is no file."""
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def read_options(role: Path) -> dict[str, dict[str, Any]]:
    """Return the options of the role's entry point `main`."""
    main_entry = read_yaml(role / "meta/argument_specs.yml")["argument_specs"]["main"]
    options: dict[str, dict[str, Any]] = main_entry.get("options", {})
    return options


def table(role: Path) -> str:
    """Return the table of a role's variables."""
    defaults = read_yaml(role / "defaults/main.yml")
    return "\n".join([HEAD, *rows(read_options(role), defaults)])


def rows(options: Mapping[str, dict[str, Any]], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield a row for every option; the fields of a list's rows follow it, once for lists of the same form."""
    forms: list[tuple[str, object]] = []
    for name, spec in options.items():
        default = spec.get("default", defaults.get(name))
        fields = spec.get("options")
        like = next((f" Rows as in `{other}`." for other, form in forms if fields and form == fields), "")
        yield row(name, spec, format_default(default), like)
        if fields and not like:
            forms.append((name, fields))
            for field, about in fields.items():
                default = "required" if about.get("required") else format_default(about.get("default"))
                yield row(f"{name}[].{field}", about, default)


def row(name: str, spec: Mapping[str, Any], default: str, like: str = "") -> str:
    """Return one row of the table."""
    kind = spec["type"] + (f" of {spec['elements']}" if "elements" in spec else "")
    choices = f" One of {', '.join(f'`{choice}`' for choice in spec['choices'])}." if "choices" in spec else ""
    meaning = f"{format_text(spec['description'])}{choices}{like}"
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in (f"`{name}`", kind, default, meaning)) + " |"


def format_default(value: object) -> str:
    """Return a default as Markdown: as one writes it in YAML if it is short, a pointer to the file if it is long."""
    if value is None:
        return ""
    plain = isinstance(value, str) and ("{{" in value or yaml.safe_load(value) == value)
    text = str(value).strip() if plain else json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST or "\n" in text:
        return "see [defaults](defaults/main.yml)"
    return f"`{text}`"


def format_text(description: str | list[str]) -> str:
    """Return a description as one line of Markdown; Ansible's markup (`C(…)`, `O(…)`, `V(…)`) becomes code."""
    text = " ".join(description) if isinstance(description, list) else description
    return re.sub(r"\b[COVI]\(([^)]*)\)", r"`\1`", " ".join(text.split()))


def render(role: Path, readme: str) -> str:
    """Return the README with the table as it should be."""
    head, begin, rest = readme.partition(BEGIN)
    _old, end, tail = rest.partition(END)
    if not (begin and end):
        raise DocsError(f"{role / 'README.md'} has no {BEGIN} followed by {END}: add both, where the table is to stand")
    return f"{head}{BEGIN}\n\n{table(role)}\n\n{END}{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a README is stale")
    parser.add_argument("roles", type=Path, nargs="?", default=ROLES, help="folder of the roles")
    asked = parser.parse_args(arguments)
    stale = []
    try:
        for role in sorted(path.parents[1] for path in asked.roles.glob("*/meta/argument_specs.yml")):
            readme = role / "README.md"
            if not readme.is_file():
                raise DocsError(f"{readme} is missing")
            text = readme.read_text(encoding="utf-8")
            wanted = render(role, text)
            if wanted != text:
                stale.append(readme)
                if not asked.check:
                    readme.write_text(wanted, encoding="utf-8")
    except DocsError as error:
        print(error, file=sys.stderr)
        return 1
    for readme in stale:
        print(f"{readme}: stale; run tests/role_docs.py" if asked.check else f"{readme}: written")
    return 1 if asked.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
