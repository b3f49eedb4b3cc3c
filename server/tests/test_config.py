"""Configuration: precedence, and findings that name their key."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from nioserve.cli import main
from nioserve.config import ConfigError, load_config


def findings(tmp_path, text: str, environment=None, flags=None) -> list[str]:
    file = tmp_path / "c.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file, environment or {}, flags or {})
    return error.value.findings


def test_flag_over_environment_over_file_over_default(tmp_path):
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump({"model": {"path": "/m"}, "server": {"port": 1, "workers": 2}, "engine": None}))
    environment = {"NIOSERVE_PORT": "3", "NIOSERVE_HOST": "::1", "HOME": "/root", "NIOSERVE_DTYPE": ""}
    config = load_config(file, environment, {"port": "4"})
    assert (config.server.port, config.server.host, config.server.workers) == (4, "::1", 2)
    assert config.engine.max_num_seqs == 32
    assert load_config(None, {"NIOSERVE_CONFIG": str(file)}, {}).server.port == 1


def test_all_findings_at_once_each_with_its_key(tmp_path):
    text = """
server: {port: 99999, prot: 1, tls: {certificate: /c}}
engine: {max_num_seqs: 0, max_num_batched_tokens: many, dtype: int4}
metrix: {port: 1}
"""
    found = findings(tmp_path, text, {"NIOSERVE_PROT": "1"}, {"workers": "x"})
    assert "engine.max_num_seqs: must be >= 1, is 0" in found
    assert "engine.max_num_batched_tokens: must be a whole number, is 'many'" in found
    assert "engine.dtype: must be one of 'auto', 'float32', 'bfloat16' or 'float16', is 'int4'" in found
    assert "server.port: must be <= 65535, is 99999" in found
    assert "server.prot: is not a known key (did you mean server.port?)" in found
    assert "metrix: is not a known key (did you mean metrics?)" in found
    assert "model: is required" in found
    assert "server.workers: must be a whole number, is 'x'" in found
    assert "NIOSERVE_PROT: is not a known environment variable (did you mean NIOSERVE_PORT?)" in found


def test_settings_that_contradict_each_other(tmp_path):
    text = """
model: {path: /m}
server: {port: 8001, tls: {key: /k, client_ca: /a}}
engine: {max_num_seqs: 64, max_num_batched_tokens: 32, max_model_len: 100, kv_cache_tokens: 10}
"""
    assert [finding.split(":")[0] for finding in findings(tmp_path, text)] == [
        "engine.max_num_batched_tokens", "engine.kv_cache_tokens", "server.tls", "server.tls.client_ca", "metrics.port",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "part"),
    [("- a", "must hold a mapping"), ("a: [", "is not valid YAML"), ("server: 5", "server: must be a mapping")],
)
def test_files_that_are_no_configuration(tmp_path, text, part):
    assert part in findings(tmp_path, text)[0]


def test_check_config_is_quick_and_imports_no_torch(tmp_path):
    file = tmp_path / "c.yml"
    file.write_text("model: {path: /srv/models/x}")
    code = (
        "import sys; from nioserve.cli import main;"
        f"assert main(['check-config', '--config', {str(file)!r}]) == 0;"
        "assert not {'torch', 'transformers', 'zmq', 'fastapi'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_check_config_with_files(tmp_path, hf_model, capsys):
    file = tmp_path / "c.yml"
    keys = tmp_path / "keys.yml"
    file.write_text(yaml.safe_dump({"model": {"path": str(tmp_path)}, "auth": {"keys_file": str(keys)}}))
    assert main(["check-config", "--config", str(file)]) == 0
    assert main(["check-config", "--config", str(file), "--files"]) == 2
    printed = capsys.readouterr().err
    assert "model.path:" in printed
    assert "auth.keys_file:" in printed
    keys.write_text("[]")
    flags = ["--config", str(file), "--files", "--model", str(hf_model)]
    assert main(["check-config", *flags]) == 0
    assert main(["check-config", *flags, "--max-model-len", "999999"]) == 2
    assert "must be <= 4096 for this model" in capsys.readouterr().err


def test_serve_without_keys_is_refused(tmp_path, hf_model, capsys):
    assert main(["serve", "--model", str(hf_model), "--keys-file", str(tmp_path / "none.yml")]) == 2
    assert "auth.keys_file" in capsys.readouterr().err
