"""The command line: `prepare`, `run`, `render`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import environments
from bench.environments import UnavailableError
from bench.goals import goals
from bench.models import PACKAGE, Models
from bench.peers import HERE, PEERS
from bench.report import PLOTS, render
from bench.results import Results, ResultsError
from bench.runner import SCENARIOS, Plan, Runner, say

DOCS = HERE.parent / "docs" / "bench"
USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 well, 1 a goal failed (with --strict) or nothing could be measured, 2 wrong usage."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ResultsError, UnavailableError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, ValueError) else 1
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(prog="python -m bench", description="Measure nioserve and its peers the same way.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    cache = Path(os.environ.get("CHATNIO_CACHE", "/var/cache/chatnio")) / "bench"
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--cache", type=Path, default=cache, help="environments, models and logs")
    shared.add_argument("--out", type=Path, default=DOCS, help="results, table and plots")

    prepared = argparse.ArgumentParser(add_help=False)
    prepared.add_argument("--peers", type=_names(PEERS), default=tuple(PEERS), metavar="A,B", help="or `none`")
    prepared.add_argument("--model", type=Path, metavar="SRC", help=f"GGUF file or Hugging Face directory ({PACKAGE})")
    prepared.add_argument("--quantised", type=Path, metavar="DIR", help="our INT8 directory (made from the model)")

    prepare = commands.add_parser("prepare", parents=[shared, prepared], formatter_class=formatter,
                                  help="install, compile and convert, without measuring")  # fmt: skip
    prepare.set_defaults(run=_prepare)

    run = commands.add_parser("run", parents=[shared, prepared], formatter_class=formatter, help="measure and report")
    run.add_argument("--scenarios", type=_names(SCENARIOS), default=SCENARIOS, metavar="A,B", help=", ".join(SCENARIOS))
    run.add_argument("--levels", type=_numbers(int), default=(1, 8, 32, 64), metavar="N,N", help="closed loop: streams")
    run.add_argument("--rates", type=_numbers(float), default=(0.5, 0.9), metavar="X,X", help="open loop: of capacity")
    run.add_argument("--rounds", type=int, default=3, help="closed loop: how often each server has its turn")
    run.add_argument("--seconds", type=float, default=5.0, help="counted at each level")
    run.add_argument("--ramp", type=float, default=2.0, help="seconds over which streams start, not counted")
    run.add_argument("--overload-minutes", type=float, default=2.0, help="open loop at 5 times capacity, ours")
    run.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", dest="settings",
                     help="a setting of nioserve, such as engine.threads=2; may be repeated")  # fmt: skip
    run.add_argument("--quick", action="store_true", help="ours alone, one short round: two minutes")
    run.add_argument("--resume", action="store_true", help="measure only what the results in --out do not hold")
    run.add_argument("--again", type=_names((*PEERS, "nioserve")), default=(), metavar="A,B",
                     help="with --resume: measure these anew")  # fmt: skip
    run.add_argument("--strict", action="store_true", help="exit 1 when a goal is not reached")
    run.set_defaults(run=_run)

    again = commands.add_parser("render", parents=[shared], formatter_class=formatter,
                                help="table and plots again, from the results alone")  # fmt: skip
    again.set_defaults(run=_render)
    return top


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type: names separated by commas."""
    names = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        given = () if text in ("", "none") else tuple(part.strip() for part in text.split(","))
        for name in given:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return given

    return parse


def _numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    """Return an argparse type: positive numbers separated by commas."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r}: give positive numbers separated by commas")
        return values

    return parse


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise argparse.ArgumentTypeError(f"{text!r}: write SECTION.KEY=VALUE, such as engine.threads=2")
    return key, value


def _prepare(options: argparse.Namespace) -> int:
    return 0 if _runner(options, _plan(options), Results(options.cache / "prepared.json")).prepare() else 1


def _run(options: argparse.Namespace) -> int:
    plan = _plan(options)
    if options.quick and options.out == DOCS:
        options.out = options.cache / "quick"  # a smoke run's figures are not for publishing
    file = options.out / "results.json"
    results = Results.load(file) if options.resume and file.exists() else Results(file)
    for name in options.again:
        results.forget(name)
    runner = _runner(options, plan, results)
    for number in (signal.SIGINT, signal.SIGTERM):  # ended either way, the servers are ended too
        signal.signal(number, signal.default_int_handler)
    runner.prepare()
    runner.run()
    _render(options)
    failed = [goal for goal in goals(results) if not goal.reached]
    for goal in failed:
        say(f"FAILED: {goal.what}: wanted {goal.wanted}, measured {goal.measured} {goal.unit} {goal.reason}")
    return 1 if options.strict and failed else 0


def _plan(options: argparse.Namespace) -> Plan:
    if not hasattr(options, "rounds"):  # `prepare`
        return Plan(options.peers, (), (), (), 0, 0, 0, 0)
    if options.quick:
        return Plan((), SCENARIOS, (1, 8, 32), (0.9,), 1, 3.0, 1.0, 0.25)
    if options.rounds < 1 or options.seconds <= 0 or options.ramp < 0 or options.overload_minutes <= 0:
        raise ValueError("--rounds, --seconds and --overload-minutes must be positive, --ramp not negative")
    return Plan(
        options.peers, options.scenarios, options.levels, options.rates,
        options.rounds, options.seconds, options.ramp, options.overload_minutes,
    )  # fmt: skip


def _runner(options: argparse.Namespace, plan: Plan, results: Results) -> Runner:
    models = Models(options.cache, options.model, options.quantised)
    return Runner(plan, options.cache, models, dict(getattr(options, "settings", [])), results)


def _render(options: argparse.Namespace) -> int:
    """Write the table, and the plots if their environment can be had."""
    results = Results.load(options.out / "results.json")
    plots: list[str] = []
    try:
        home = environments.ensure("plots", options.cache)
        command = [
            str(home / "bin" / "python"),
            "-m",
            "bench.plots",
            str(options.out / "results.json"),
            str(options.out),
        ]
        environments.run(command, options.cache / "log" / "plots.log", {"PYTHONPATH": str(HERE)})
        plots = list(PLOTS)
    except UnavailableError as error:
        say(f"no plots: {error}")
    report = options.out / "README.md"
    report.write_text(render(results, plots), encoding="utf-8")
    say(f"{report}")
    return 0
