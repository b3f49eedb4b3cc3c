"""Making models for tests, and running the service as an operator would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nioserve.policy.identity import new_key

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.first %}{{ raise_exception('a conversation begins with a user') }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 258  # <|im_end|>: after 256 bytes
CONTEXT = 4096


def make_tokenizer() -> Tokenizer:
    """Bytes as tokens: every character beyond ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def make_config(family: str, **changes):
    from transformers import AutoConfig

    settings = {
        "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": EOS, "bos_token_id": 257,
        "pad_token_id": 256, "initializer_range": 0.3, "use_cache": True,
    }  # fmt: skip
    return AutoConfig.for_model(family, **{**settings, **changes})


def make_model(directory: Path, family: str, seed: int = 0, **changes) -> Path:
    """Write a random model with tokeniser and chat template."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes)).to(torch.float32)
    with torch.no_grad():  # norms and biases that do something, or a mistake with them would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                scale = name.endswith("weight") and ("norm" in name or ".ln_" in name)
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if scale else 0))
    model.generation_config.eos_token_id = [EOS]
    model.save_pretrained(directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "tokenizer_class": "TokenizersBackend"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def free_port(besides: int = 0) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return port if port != besides else free_port(besides)


def wait_for(condition, seconds: float = 15, what: str = "it"):
    """Return the condition's first true value; fail when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds} s")


class Service:
    """`nioserve serve` with its own ports, keys and directories."""

    def __init__(self, directory: Path, model_dir: Path, env: dict[str, str] | None = None, **sections) -> None:
        self.directory, self.model = directory, "tiny"
        self.key, record = new_key("alice", "Alice", "cardiology")
        # Not below pytest's directories: their names are too long for sockets.
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="nio-test-"))
        self.keys_file = directory / "keys.yml"
        self.keys_file.write_text(yaml.safe_dump([record]))
        self.port = free_port()
        self.metrics_port = free_port(besides=self.port)
        config = {
            "server": {"port": self.port, "workers": 1, "shutdown_timeout": 20, "max_body_bytes": 65536},
            "metrics": {"port": self.metrics_port},
            "model": {"path": str(model_dir), "served_name": "tiny"},
            "engine": {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_tokens": 16384, "threads": 1},
            "auth": {"keys_file": str(self.keys_file)},
            "runtime_dir": str(self.runtime_dir),
        }
        for name, section in sections.items():
            config.setdefault(name, {}).update(section)
        self.config_file = directory / "config.yml"
        self.config_file.write_text(yaml.safe_dump(config))
        self.scheme = "https" if config["server"].get("tls") else "http"
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}

    def __enter__(self) -> Service:
        self.log = (self.directory / "log").open("w+")
        command = [sys.executable, "-m", "nioserve", "serve", "--config", str(self.config_file)]
        self.process = subprocess.Popen(command, stderr=self.log, env=self.env)
        wait_for(self.ready, 40, "readiness")
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.runtime_dir)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log_text()
        return self.probe() == 200

    def probe(self, path: str = "/readyz") -> int:
        """Return what a probe says on the metrics port."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.metrics_port}{path}").status_code
        except httpx.TransportError:
            return 0

    def log_text(self) -> str:
        return (self.directory / "log").read_text()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def body(self, content: str = "hello", **changes) -> dict:
        base = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return {**base, "max_tokens": 8, **changes}

    def chat(self, content: str = "hello", **changes) -> httpx.Response:
        return httpx.post(self.url + "/v1/chat/completions", json=self.body(content, **changes),
                          headers=self.headers, timeout=60)  # fmt: skip

    def stream(self, content: str = "hello", **changes):
        """Return the context of a streaming response."""
        return httpx.stream("POST", self.url + "/v1/chat/completions", headers=self.headers, timeout=60,
                            json=self.body(content, stream=True, **changes))  # fmt: skip

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        total = 0.0
        for line in text.splitlines():
            if line.startswith((f"nioserve_{name}{{", f"nioserve_{name} ")) and all(
                f'{key}="{value}"' in line for key, value in labels.items()
            ):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def children(self, module: str) -> list[int]:
        """Return the pids of this service's children that run a module."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                command = (directory / "cmdline").read_text()
            except OSError:
                continue
            if parent == self.process.pid and module in command:
                found.append(int(directory.name))
        return found

    def kill(self, module: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the first child that runs a module; return its pid."""
        pid = self.children(module)[0]
        os.kill(pid, number)
        return pid


def events(response: httpx.Response) -> list[dict]:
    """Return the objects of a finished stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def text_of(chunks: list[dict]) -> str:
    """Return a streamed answer's text."""
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
