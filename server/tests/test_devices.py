"""Devices are named, chosen and kept apart: on a machine without a GPU, by torch's fake tensors, which know theirs."""

from __future__ import annotations

import pytest
import torch
from support import CONTEXT, make_config, make_model
from torch._subclasses.fake_tensor import FakeTensorMode

from nioserve.models import device as devices
from nioserve.models import linear
from nioserve.models.batch import Chunk, build_batch
from nioserve.models.cache import BLOCK_SIZE
from nioserve.models.decoder import Decoder
from nioserve.models.device import CPU, compute_types, device_memory, on_device, resolve_device, zeros
from nioserve.models.int8 import check, pack_int_mm
from nioserve.models.linear import Int8Linear, quantise_rows
from nioserve.models.loader import load
from nioserve.models.quantize import quantize
from nioserve.models.spec import ModelError, load_spec
from nioserve.models.weights import Tensors, Weights

CUDA = torch.device("cuda", 0)
FAKE = torch.device("meta")  # treated as a GPU, and needs none: within FakeTensorMode it keeps apart from the CPU
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")
CHUNKS = [
    Chunk([1, 2, 3, 4, 5], 0, [0], 2),
    Chunk([7], 17, [3, 2], 1),
    Chunk([8], 40, [5, 6, 7], 1),
    Chunk([9] * 20, 10, [8, 9], 0, pool=True),
]


class Blank:
    """The tensors of a directory by name, shape and type; their values do not matter."""

    def __init__(self, directory) -> None:
        source = Tensors(directory)
        self._kinds = {name: (source.get(name).shape, source.get(name).dtype) for name in source.names()}

    def names(self) -> list[str]:
        return sorted(self._kinds)

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    def get(self, name: str) -> torch.Tensor:
        shape, dtype = self._kinds[name]
        return torch.empty(shape, dtype=dtype)


def test_names_of_devices(monkeypatch):
    assert resolve_device("cpu") == CPU
    for name in ("gpu", "cuda:", "cuda:x", "mps", "cpu:0", ""):
        with pytest.raises(ModelError, match=r"engine.device.* is not auto, cpu, cuda, cuda:N"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ModelError, match=r"cuda:1 is not available.*no GPU"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ModelError, match="torch finds 2 GPUs"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ModelError, match="built for ROCm"):
        resolve_device("rocm")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert resolve_device("rocm:1") == torch.device("cuda", 1)


def test_types_follow_the_device(monkeypatch):
    single, brain, half = torch.float32, torch.bfloat16, torch.float16
    assert compute_types("auto", "float32", False, CPU) == (single, single)
    assert compute_types("auto", "float16", False, CPU) == (brain, brain)
    assert compute_types("auto", "float16", True, CPU) == (single, brain)
    assert compute_types("float32", "float16", True, CPU) == (single, single)
    with pytest.raises(ModelError, match="float16 has no fast kernels"):
        compute_types("float16", "float16", False, CPU)
    with pytest.raises(ModelError, match="float8"):
        compute_types("auto", "float8_e4m3fn", False, CPU)
    monkeypatch.setattr(devices, "_has_bfloat16", lambda _: True)
    assert compute_types("auto", "float32", False, CUDA) == (brain, brain)
    assert compute_types("float16", "float32", False, CUDA) == (half, half)
    monkeypatch.setattr(devices, "_has_bfloat16", lambda _: False)
    assert compute_types("auto", "bfloat16", False, CUDA) == (half, half)
    assert compute_types("auto", "bfloat16", True, CUDA) == (single, half)
    with pytest.raises(ModelError, match="has no bfloat16"):
        compute_types("bfloat16", "bfloat16", False, CUDA)


def test_memory_is_that_of_gpus(monkeypatch):
    with pytest.raises(ValueError, match="no GPU"):
        device_memory(CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4)
    assert device_memory(CUDA) == (13, 100)


def test_zeros_and_batches_on_the_cpu_stay_there():
    assert zeros((3, 5), torch.bfloat16, CPU).eq(0).all()
    batch = build_batch(CHUNKS, BLOCK_SIZE)
    assert on_device(batch, CPU) is batch


@pytest.mark.parametrize("quantised", [False, True])
def test_decoder_keeps_to_its_device(quantised, hf_model, int8_model, monkeypatch):
    directory = int8_model if quantised else hf_model
    monkeypatch.setattr(linear, "best_packer", lambda _device: pack_int_mm)
    spec, blank = load_spec(directory), Blank(directory)
    with FakeTensorMode():  # refuses every operation on tensors of two devices
        weights = Weights(blank, torch.float32 if quantised else torch.bfloat16, frozenset({"down_proj"}), FAKE)
        decoder = Decoder(spec, weights, CONTEXT, torch.bfloat16)
        cache = decoder.new_cache(16)
        out = decoder.forward(CHUNKS, cache)
        assert {tensor.device for tensor in (out.logits, out.pooled, *cache.layers)} == {FAKE}
        assert out.logits.shape == (4, spec.vocab_size)
        assert out.pooled.shape == (1, spec.hidden_size)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "gpt_oss"])
def test_other_models_keep_to_their_device(family):
    from transformers import AutoModelForCausalLM

    from nioserve.models.hf.attention import NAME, Step, running
    from nioserve.models.hf.cache import PagedCache

    config = make_config(family, sliding_window=24)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(FAKE):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=NAME).eval()
        cache = PagedCache(None, 16, torch.bfloat16, FAKE)
        with torch.device(CPU):
            batch = on_device(build_batch(CHUNKS, BLOCK_SIZE), FAKE)
        with running(Step(batch, cache)), torch.inference_mode():
            mask = torch.ones_like(batch.tokens).unsqueeze(0)
            out = network(input_ids=batch.tokens.unsqueeze(0), position_ids=batch.positions.unsqueeze(0),
                          attention_mask=mask, use_cache=False).logits  # fmt: skip
        assert out.device == FAKE
        assert {tensor.device for layer in cache.layers for tensor in (layer.keys, layer.values)} == {FAKE}


def test_int8_product_fills_up_to_what_gpus_want():
    seen = []
    with FakeTensorMode():
        real = torch._int_mm
        weight, scale = torch.empty(50, 30, dtype=torch.int8, device=FAKE), torch.empty(50, device=FAKE)
        product = pack_int_mm(weight, scale)
        try:
            torch._int_mm = lambda a, b: seen.append((a.shape, b.shape)) or real(a, b)
            assert product(torch.empty(3, 30, dtype=torch.uint8, device=FAKE)).shape == (3, 50)
        finally:
            torch._int_mm = real
    assert seen == [((32, 32), (32, 56))]


@NEEDS_GPU
def test_int8_counts_right_on_a_gpu():
    assert check(pack_int_mm, CUDA) is None
    torch.manual_seed(0)
    weight, scale = quantise_rows(torch.randn(50, 30))
    for wide in (False, True):
        x = torch.randn(5, 30)
        on_cpu = Int8Linear(weight, scale, None, wide=wide)(x)
        on_gpu = Int8Linear(weight.to(CUDA), scale.to(CUDA), None, wide=wide)(x.to(CUDA))
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


@NEEDS_GPU
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_gpu_gives_the_logits_of_the_cpu(family, quantised, tmp_path):
    make_model(tmp_path / "model", family)
    directory = quantize(tmp_path / "model", tmp_path / "int8") if quantised else tmp_path / "model"
    found = []
    for name in ("cpu", "cuda"):
        model = load(directory, "float32", 256, name)
        cache = model.new_cache(4)
        found.append(model.forward([Chunk(list(range(40)), 0, [3, 1, 2], 40)], cache).logits.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)
