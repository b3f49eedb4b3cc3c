"""The command line. Heavy imports wait until a command needs them: checking a configuration must be quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nioserve import __version__
from nioserve.config.load import FLAGS, ConfigError, env_name, load_config
from nioserve.config.schema import Config

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 well, 1 failed, 2 wrong usage or configuration."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except ConfigError as error:
        for finding in error.findings:
            print(f"nioserve: {finding}", file=sys.stderr)
        return USAGE_ERROR
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nioserve", description="An OpenAI-compatible model service.")
    parser.add_argument("--version", action="version", version=f"nioserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model", description="Serve a model.")
    _add_config(serve)
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check-config", help="validate a configuration")
    _add_config(check)
    check.add_argument("--files", action="store_true", help="check the files it names as well: model, keys, TLS")
    check.set_defaults(run=_check_config)

    quantize = commands.add_parser(
        "quantize",
        help="convert a model to an INT8 model directory",
        description="Convert a model to an INT8 model directory. The same source gives the same bytes. Smoothing runs "
        "a few thousand tokens through the model, one layer at a time in float64. Memory: up to 2.5 GiB for what is "
        "being written, and six times the largest layer or the embedding in 16 bits, whichever is larger.",
    )
    _add_conversion(quantize)
    quantize.add_argument(
        "--no-smoothing", action="store_true", help="only round: much faster, and less true to the source"
    )
    quantize.set_defaults(run=_quantize)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure what a conversion cost",
        description="Run a converted model, by the code that serves it, and its source over texts of our own and over "
        "the source's answers to our prompts, and compare them. Exit status 0 only if all gates pass.",
    )
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="the model directory")
    evaluate.add_argument(
        "--reference", type=Path, metavar="SRC", help="what it was made from: a Hugging Face directory or a GGUF file; "
        "runs in float32",
    )  # fmt: skip
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for option, default, what in (
        ("min-accuracy", 0.99, "least next-token accuracy, as a share of the reference's"),
        ("max-perplexity", 1.02, "largest perplexity, as a share of the reference's"),
        ("min-agreement", 0.94, "least share of tokens whose most likely successor is the reference's"),
        ("max-weight-bytes", 0.51, "largest size of the weights, as a share of 16 bits each"),
    ):
        evaluate.add_argument(f"--{option}", type=float, default=default, help=f"{what} (default: {default})")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="convert a model to an INT8 model directory for ONNX Runtime")
    _add_conversion(export)
    export.set_defaults(run=_export)

    key = commands.add_parser("key", help="manage API keys").add_subparsers(required=True, metavar="COMMAND")
    new = key.add_parser("new", help="make an API key and the record for the keys file")
    new.add_argument("--id", required=True, dest="key_id", help="a name for the key: a-z, 0-9 and -")
    new.add_argument("--user", required=True)
    new.add_argument("--department", required=True)
    new.set_defaults(run=_key_new)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (or NIOSERVE_CONFIG)")
    for flag, key in FLAGS.items():
        parser.add_argument(f"--{flag}", dest=f"flag:{flag}", metavar="VALUE", help=f"{key} (or {env_name(flag)})")


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="a Hugging Face directory, or a GGUF file")
    parser.add_argument("target", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument("--name", help="the name it is served under (default: from SRC)")
    for option in ("temperature", "top-p"):
        parser.add_argument(f"--{option}", type=float, help=f"{option} for requests that name none")


def _config(options: argparse.Namespace) -> Config:
    flags = {
        name.removeprefix("flag:"): value
        for name, value in vars(options).items()
        if name.startswith("flag:") and value is not None
    }
    return load_config(options.config, os.environ, flags)


def _serve(options: argparse.Namespace) -> int:
    from nioserve import logs
    from nioserve.supervisor.supervisor import serve

    config = _config(options)
    logs.set_up("supervisor", config.log.level, config.log.format)
    return serve(config)


def _check_config(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.files:
        from nioserve.supervisor.runtime import file_findings

        findings = file_findings(config)
        if findings:
            raise ConfigError(findings)
    print("The configuration is valid.")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from nioserve.models.quantize import quantize

    return _convert(options, "quantize", partial(quantize, smooth=not options.no_smoothing))


def _export(options: argparse.Namespace) -> int:
    from nioserve.backends.export import export

    return _convert(options, "export", export)


def _convert(options: argparse.Namespace, command: str, convert: Callable[..., Path]) -> int:
    from nioserve import logs
    from nioserve.models.spec import ModelError

    logs.set_up(command, "info", "text")
    given = {"temperature": options.temperature, "top_p": options.top_p}
    defaults = {key: value for key, value in given.items() if value is not None}
    try:
        print(convert(options.source, options.target, options.name, defaults))
    except ModelError as error:
        print(f"nioserve: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    import json

    from nioserve import logs
    from nioserve.evaluate.measure import measure
    from nioserve.evaluate.report import Gates, compare
    from nioserve.models.spec import ModelError

    logs.set_up("evaluate", "info", "text")
    gates = Gates(options.min_accuracy, options.max_perplexity, options.min_agreement, options.max_weight_bytes)
    try:
        reference = measure(options.reference, "float32", None) if options.reference else None
        model = measure(options.model, "auto", reference.answers if reference else None)
    except ModelError as error:
        print(f"nioserve: {error}", file=sys.stderr)
        return 1
    report = compare(model, reference, gates)
    print(json.dumps(report.as_json(), indent=2) if options.json else report.as_text())
    return 0 if report.passed else 1


def _key_new(options: argparse.Namespace) -> int:
    import yaml

    from nioserve.policy.identity import new_key

    try:
        key, record = new_key(options.key_id, options.user, options.department)
    except ValueError as error:
        print(f"nioserve: {error}", file=sys.stderr)
        return USAGE_ERROR
    print(f"# The key. It is shown once and stored nowhere; hand it to {options.user} by a safe way:")
    print(f"#   {key}")
    print("# The record for the keys file (auth.keys_file):")
    print(yaml.safe_dump([record], sort_keys=False, allow_unicode=True), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
