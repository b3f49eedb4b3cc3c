"""Write a model as vLLM's INT8: compressed-tensors, weights per output channel, activations per token when they come.

usage: python -m bench.w8a8 HF_DIRECTORY OUT

Plain rounding without calibration. It is vLLM's fast INT8 path that is measured here, not how well it answers.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_SETTINGS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def convert(source: Path, target: Path) -> None:
    """Convert a Hugging Face directory with one safetensors file."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in {".json", ".jinja"}:
            shutil.copy(file, target)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _SETTINGS
    config["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config, indent=2))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight.to(torch.bfloat16)
            continue
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        tensors[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        tensors[name + "_scale"] = scale
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
