"""Every role's README and specification say what its defaults are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("role_docs", TESTS / "role_docs.py")
role_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(role_docs)

ROLES = sorted(path for path in role_docs.ROLES.iterdir() if (path / "defaults/main.yml").is_file())
SPECS = """argument_specs:
  main:
    short_description: Paint
    options:
      paint_colour: {description: A colour (O(paint_coats) of it)., type: str, choices: [red, blue], default: red}
      paint_version: {description: Text that looks like a number., type: str, default: "1"}
      paint_thinner: {description: "Computed, a|b.", type: str}
      paint_coats: &coats {description: [Coats.], type: list, elements: dict, options: {
        name: {description: Its name., type: str, required: true}, wet: {description: Wet., type: bool}}}
      paint_more: *coats
"""


def each_role(test):
    return pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)(test)


@pytest.fixture
def roles(tmp_path):
    """A folder with one role, whose README was never written."""
    for name, text in {
        "meta/argument_specs.yml": SPECS,
        "defaults/main.yml": 'paint_thinner: "{{ a | b }}"\npaint_coats: [{name: first, wet: true}, '
        "{name: second, wet: true}, {name: third}]\n",
        "README.md": "# paint\n\n<!-- variables -->\n<!-- /variables -->\n\nThe end.\n",
    }.items():
        path = tmp_path / "paint" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@each_role
def test_specification_names_just_the_defaults(role):
    assert role_docs.read_options(role).keys() == role_docs.read_yaml(role / "defaults/main.yml").keys()


@each_role
def test_specified_default_is_the_default(role):
    defaults = role_docs.read_yaml(role / "defaults/main.yml")
    specified = {name: about["default"] for name, about in role_docs.read_options(role).items() if "default" in about}
    assert specified == {name: defaults[name] for name in specified}


@each_role
def test_plain_default_is_specified(role):
    """Without it, `ansible-doc` and preflight don't know the default."""
    plain = {
        name
        for name, value in role_docs.read_yaml(role / "defaults/main.yml").items()
        if not (isinstance(value, (list, dict)) and value) and not (isinstance(value, str) and "{{" in value)
    }
    assert not plain - {name for name, about in role_docs.read_options(role).items() if "default" in about}


@each_role
def test_readme_tells_limitations(role):
    assert "## Limitations" in (role / "README.md").read_text()


def test_readmes_are_current(capsys):
    assert role_docs.main(["--check"]) == 0, capsys.readouterr().out


def test_table(roles):
    assert role_docs.main([str(roles)]) == 0
    assert (
        (roles / "paint/README.md").read_text()
        == """# paint

<!-- variables -->

| Variable | Type | Default | Meaning |
|---|---|---|---|
| `paint_colour` | str | `red` | A colour (`paint_coats` of it). One of `red`, `blue`. |
| `paint_version` | str | `"1"` | Text that looks like a number. |
| `paint_thinner` | str | `{{ a \\| b }}` | Computed, a\\|b. |
| `paint_coats` | list of dict | see [defaults](defaults/main.yml) | Coats. |
| `paint_coats[].name` | str | required | Its name. |
| `paint_coats[].wet` | bool |  | Wet. |
| `paint_more` | list of dict |  | Coats. Rows as in `paint_coats`. |

<!-- /variables -->

The end.
"""
    )


def test_check_names_what_is_stale_and_writes_nothing(roles, capsys):
    readme = roles / "paint/README.md"
    before = readme.read_text()
    assert role_docs.main(["--check", str(roles)]) == 1
    assert str(readme) in capsys.readouterr().out
    assert readme.read_text() == before


def test_second_run_writes_nothing(roles, capsys):
    role_docs.main([str(roles)])
    capsys.readouterr()
    assert role_docs.main([str(roles)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["# paint\n", "<!-- variables -->\n", "<!-- /variables --><!-- variables -->\n", None])
def test_readme_without_a_place_for_the_table(roles, text, capsys):
    readme = roles / "paint/README.md"
    readme.unlink() if text is None else readme.write_text(text)
    assert role_docs.main([str(roles)]) == 1
    assert str(readme) in capsys.readouterr().err
