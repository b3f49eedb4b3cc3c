"""One configuration out of flags, environment, file and defaults, in that order of precedence.

Every setting has a flag and an environment variable of the same name (`--max-num-seqs`, `NIOSERVE_MAX_NUM_SEQS`). All
findings are reported at once, each with its key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nioserve.config.schema import Config, contradictions

ENV_PREFIX = "NIOSERVE_"
CONFIG_ENV = "NIOSERVE_CONFIG"

FLAGS: dict[str, str] = {
    "host": "server.host",
    "port": "server.port",
    "workers": "server.workers",
    "shutdown-timeout": "server.shutdown_timeout",
    "request-timeout": "server.request_timeout",
    "stalled-read-timeout": "server.stalled_read_timeout",
    "max-body-bytes": "server.max_body_bytes",
    "tls-certificate": "server.tls.certificate",
    "tls-key": "server.tls.key",
    "tls-client-ca": "server.tls.client_ca",
    "metrics-host": "metrics.host",
    "metrics-port": "metrics.port",
    "model": "model.path",
    "served-model-name": "model.served_name",
    "max-num-seqs": "engine.max_num_seqs",
    "max-model-len": "engine.max_model_len",
    "max-num-batched-tokens": "engine.max_num_batched_tokens",
    "max-num-queued-reqs": "engine.max_num_queued_reqs",
    "max-num-queued-tokens": "engine.max_num_queued_tokens",
    "conversation-share": "engine.conversation_share",
    "queue-timeout": "engine.queue_timeout",
    "prefix-cache": "engine.prefix_cache",
    "speculate-tokens": "engine.speculate_tokens",
    "speculate-max-num-seqs": "engine.speculate_max_num_seqs",
    "kv-cache-tokens": "engine.kv_cache_tokens",
    "threads": "engine.threads",
    "dtype": "engine.dtype",
    "device": "engine.device",
    "kernels": "engine.kernels",
    "kv-cache-dtype": "engine.kv_cache_dtype",
    "hang-timeout": "engine.hang_timeout",
    "long-conversation-turns": "engine.long_conversation_turns",
    "backend": "engine.backend",
    "upstream-urls": "upstream.urls",
    "upstream-metrics-urls": "upstream.metrics_urls",
    "upstream-model": "upstream.model",
    "upstream-api-key-file": "upstream.api_key_file",
    "upstream-tls-ca": "upstream.tls.ca",
    "upstream-tls-certificate": "upstream.tls.certificate",
    "upstream-tls-key": "upstream.tls.key",
    "upstream-connect-timeout": "upstream.connect_timeout",
    "upstream-read-timeout": "upstream.read_timeout",
    "upstream-breaker-failures": "upstream.breaker_failures",
    "upstream-breaker-cooldown": "upstream.breaker_cooldown",
    "keys-file": "auth.keys_file",
    "log-level": "log.level",
    "log-format": "log.format",
    "runtime-dir": "runtime_dir",
}
"""Each flag and the key it sets."""


class ConfigError(Exception):
    """A configuration that cannot be used; `findings` has one line per fault, each starting with its key."""

    def __init__(self, findings: list[str]) -> None:
        super().__init__("\n".join(findings))
        self.findings = findings


def load_config(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, str]) -> Config:
    """Return the validated configuration; ConfigError with all findings.

    `flags` maps flag names without dashes to their text, only those that were given.
    """
    if file is None and environment.get(CONFIG_ENV):
        file = Path(environment[CONFIG_ENV])
    values = _read(file) if file else {}
    findings: list[str] = []
    for key, text in [*_from_environment(environment, findings), *((FLAGS[name], v) for name, v in flags.items())]:
        _set(values, key.split("."), text)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(findings + [_describe(item) for item in error.errors()]) from error
    findings += contradictions(config)
    if findings:
        raise ConfigError(findings)
    return config


def env_name(flag: str) -> str:
    """Return the environment variable of a flag."""
    return ENV_PREFIX + flag.upper().replace("-", "_")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint in brackets, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: is not valid YAML: {' '.join(str(error).split())}"]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{file}: must hold a mapping, holds a {type(values).__name__}"])
    # `engine:` with nothing below it means defaults, as everywhere in YAML configurations.
    return {key: value for key, value in values.items() if value is not None}


def _from_environment(environment: Mapping[str, str], findings: list[str]) -> list[tuple[str, str]]:
    names = {env_name(flag): key for flag, key in FLAGS.items()}
    found = []
    for name, text in sorted(environment.items()):
        if not name.startswith(ENV_PREFIX) or name == CONFIG_ENV or text == "":
            continue
        if name in names:
            found.append((names[name], text))
        else:
            findings.append(f"{name}: is not a known environment variable{did_you_mean(name, names)}")
    return found


def _set(values: dict[str, Any], path: list[str], text: str) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            return  # the schema reports the section itself
        values = inner
    values[path[-1]] = text


def _describe(error: Any) -> str:  # noqa: ANN401  pydantic's error details, a TypedDict with open contents
    location, context, kind = [str(part) for part in error["loc"]], error.get("ctx", {}), error["type"]
    key, given = ".".join(location), error.get("input")
    if kind == "extra_forbidden":
        return f"{key}: is not a known key{_known_near(location)}"
    texts = {
        "missing": "is required",
        "greater_than_equal": f"must be >= {context.get('ge')}, is {given}",
        "less_than_equal": f"must be <= {context.get('le')}, is {given}",
        "literal_error": f"must be one of {context.get('expected')}, is {given!r}",
        "int_parsing": f"must be a whole number, is {given!r}",
        "int_type": f"must be a whole number, is {given!r}",
        "int_from_float": f"must be a whole number, is {given!r}",
        "float_parsing": f"must be a number, is {given!r}",
        "float_type": f"must be a number, is {given!r}",
        "string_type": f"must be text, is {given!r}",
        "string_too_short": "must not be empty",
        "model_type": f"must be a mapping, is {given!r}",
    }
    return f"{key}: {texts.get(kind, error['msg'] + f', is {given!r}')}"


def _known_near(location: list[str]) -> str:
    """Suggest a key of the same section, else the same key of another section."""
    keys = set(FLAGS.values()) | {".".join(key.split(".")[:-1]) for key in FLAGS.values()} - {""}
    hint = did_you_mean(".".join(location), keys)
    if hint:
        return hint
    last = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = difflib.get_close_matches(location[-1], list(last), n=1)
    return f" (did you mean {last[close[0]]}?)" if close else ""
