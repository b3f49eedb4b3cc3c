"""What this machine could do at best, measured in the same run: reading memory, and multiplying matrices.

The share that an engine reaches of it says how much is left, and whether a slow figure is the engine's or a busy
machine's. usage: python -m bench.machine MODEL_DIRECTORY   (prints JSON; a process of its own, since it loads torch)
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECONDS = 1.0
ROWS = (32, 512)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a decoder: parameters in its layers, and in its output head; bytes at int8 are as many."""

    layers: int
    head: int
    hidden: int
    width: int  # of the largest product in a layer: gate and up as one

    @classmethod
    def read(cls, directory: Path) -> Sizes:
        """Read them from a configuration in the Hugging Face form."""
        config = json.loads((directory / "config.json").read_text())
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        size = config.get("head_dim") or hidden // config["num_attention_heads"]
        queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
        layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner
        return cls(layer * config["num_hidden_layers"], config["vocab_size"] * hidden, hidden, 2 * inner)


def ceiling(ceilings: dict[str, Any], sizes: dict[str, int], streams: int, prompt: int, answer: int) -> float:
    """Return the tokens/s that the machine allows at int8 for `streams` at a time.

    A step reads every weight once and multiplies it by each stream's row, whichever takes longer; a prompt's rows are
    multiplied at the rate of a large product. Attention, activations and everything else are taken as free.
    """
    weights = sizes["layers"] + sizes["head"]
    step = max(
        weights / (ceilings["read_gb_per_s"] * 1e9),
        2 * weights * min(streams, ROWS[0]) / (ceilings[f"int8_tops_{ROWS[0]}"] * 1e12),
    ) / min(streams, ROWS[0])
    prefill = (2 * sizes["layers"] * prompt + 2 * sizes["head"]) / (ceilings[f"int8_tops_{ROWS[1]}"] * 1e12)
    return float(answer / (answer * step + prefill))


def measure(directory: Path, project: Path) -> dict[str, Any]:
    """Return ceilings and the machine's description, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.machine", str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def describe() -> dict[str, Any]:
    """Return what the machine is, and how busy it is already."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = info.get("flags", "").split()
    notable = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "cpu": info.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in notable if name in flags],
        "memory_gib": round(memory, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def _rate(work: Callable[[], object]) -> float:
    """Return calls/s: the best of five slices, because what disturbs only ever slows down."""
    work()
    best = 0.0
    for _ in range(5):
        calls, begin = 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < SECONDS / 5:
            work()
            calls += 1
        best = max(best, calls / passed)
    return best


def _measure(sizes: Sizes) -> dict[str, Any]:
    import torch

    weights = sizes.layers + sizes.head
    data = torch.ones(weights // 8, dtype=torch.int64)  # as many bytes as the int8 weights
    found: dict[str, Any] = {"read_gb_per_s": round(_rate(data.sum) * data.nbytes / 1e9, 1)}
    weight = torch.randn(sizes.width, sizes.hidden)
    scales = torch.full((sizes.width,), 0.01)
    zeros = torch.zeros(sizes.width, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack((weight * 20).to(torch.int8), None)
    for rows in ROWS:
        operations = 2 * rows * sizes.width * sizes.hidden / 1e12
        half, half_weight = torch.randn(rows, sizes.hidden).bfloat16(), weight.bfloat16().t()
        found[f"bf16_tops_{rows}"] = round(_rate(lambda a=half, b=half_weight: a @ b) * operations, 2)  # type: ignore[misc]
        given = torch.randint(0, 255, (rows, sizes.hidden), dtype=torch.uint8)

        def product(given: torch.Tensor = given) -> object:
            return torch.ops.onednn.qlinear_pointwise(
                given, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )

        found[f"int8_tops_{rows}"] = round(_rate(product) * operations, 2)
    return found


if __name__ == "__main__":
    model = Sizes.read(Path(sys.argv[1]))
    print(json.dumps({"machine": describe(), "ceilings": _measure(model), "model": asdict(model)}))
