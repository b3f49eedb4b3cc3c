"""The native kernels: exact where they can be, near where they round, for every build that this processor can run."""

from __future__ import annotations

import pytest
import torch
from support import CONTEXT, make_model

from nioserve.models.batch import Chunk
from nioserve.models.decoder import Decoder
from nioserve.models.native import library
from nioserve.models.native.decoder import NativeDecoder
from nioserve.models.quantize import quantize
from nioserve.models.spec import load_spec
from nioserve.models.weights import Tensors, Weights

LEVELS = library.supported_levels()
pytestmark = pytest.mark.skipif(not LEVELS, reason="this processor has no AVX-512 with VNNI")
WIDE = frozenset({"down_proj"})


@pytest.fixture(params=LEVELS or ["none"])
def kernels(request):
    """One build, as it is loaded for service: checked against exact products."""
    return library.load(request.param)


def random_linear(kernels, outputs: int, inputs: int, bias: bool = False, **options):
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale = torch.rand(outputs) * 0.01 + 0.001
    offset = torch.randn(outputs) if bias else None
    exact = (weight.double() * scale.double().unsqueeze(1), 0 if offset is None else offset.double())
    return library.Linear(kernels, weight, scale, offset, **options), exact


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 64), (33, 65), (100, 576), (64, 130)])
def test_products_are_as_near_as_their_steps(kernels, outputs, inputs, wide):
    torch.manual_seed(outputs + inputs)
    linear, (weight, bias) = random_linear(kernels, outputs, inputs, bias=True, wide=wide)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 70):
        x = torch.randn(rows, inputs) * 3 + 1
        # Each activation is off by half a step at most, so a product is by half a step times the sum of the weights.
        step = (x.amax(1) - x.amin(1)) / (65535 if wide else 255)
        bound = (0.51 * step.unsqueeze(1) * weight.abs().sum(1)).double() + 1e-4 * (1 + weight.abs().sum(1))
        got = linear(x).double()
        assert ((got - (x.double() @ weight.t() + bias)).abs() <= bound).all(), f"{rows} rows"


def test_a_gated_product_is_silu_times_the_other_half(kernels):
    torch.manual_seed(3)
    linear, (weight, bias) = random_linear(kernels, 2 * 40, 96, bias=True, wide=True, gated=True)
    x = torch.randn(19, 96)
    gate, up = (x.double() @ weight.t() + bias).chunk(2, dim=1)
    assert torch.allclose(linear(x).double(), torch.nn.functional.silu(gate) * up, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("wide", [False, True])
def test_odd_rows_stay_finite_and_right(kernels, wide):
    torch.manual_seed(4)
    linear, (weight, _) = random_linear(kernels, 48, 80, wide=wide)
    x = torch.zeros(20, 80)
    x[1], x[2], x[3] = 5.0, -1e-30, torch.arange(80) * 1e30
    got = linear(x)
    assert got.isfinite().all()
    assert (got[0] == 0).all()
    assert torch.allclose(got[1].double(), 5 * weight.sum(1), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def model(request, tmp_path_factory):
    """A random quantised model of each family, odd in its sizes."""
    changes = {"qwen3": {"tie_word_embeddings": False}, "mistral": {"head_dim": 48, "sliding_window": None}}
    folder = tmp_path_factory.mktemp(request.param)
    source = make_model(folder / "source", request.param, intermediate_size=104, **changes.get(request.param, {}))
    return quantize(source, folder / "int8", "tiny")


def native(kernels, model, int8_cache: bool = False, threads: int = 2) -> NativeDecoder:
    weights = Weights(Tensors(model), torch.float32, WIDE)
    return NativeDecoder(kernels, load_spec(model), weights, CONTEXT, int8_cache=int8_cache, threads=threads)


def conversation(decoder, prompts: list[list[int]], tables: list[list[int]]) -> torch.Tensor:
    """Run prompts and then two tokens more of each, and return all logits there are."""
    cache = decoder.new_cache(64)
    tokens = [len(prompt) for prompt in prompts]
    first = [Chunk(p, 0, t, len(p)) for p, t in zip(prompts, tables, strict=True)]
    then = [Chunk([7, 9], n, t, 2) for n, t in zip(tokens, tables, strict=True)]
    # Copied: the next step may overwrite them.
    return torch.cat([decoder.forward(chunks, cache).logits.clone() for chunks in (first, then)])


PROMPT_LENGTHS = (200, 3, 41, 1)
TABLES = [list(range(13)), [20], [33, 31, 50], [40]]


def random_prompts() -> list[list[int]]:
    torch.manual_seed(5)
    return [torch.randint(0, 256, (n,)).tolist() for n in PROMPT_LENGTHS]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("int8_cache", [False, True])
def test_a_step_is_as_near_to_exact_arithmetic_as_the_plain_decoder(kernels, model, int8_cache):
    prompts = random_prompts()
    # Exact: the same weights, multiplied out in floating point.
    exact = conversation(exact_decoder(model), prompts, TABLES)
    plain = Decoder(load_spec(model), Weights(Tensors(model), torch.float32, WIDE), CONTEXT, torch.bfloat16)
    tolerance = 2.5 if int8_cache else 1.5
    assert error(conversation(native(kernels, model, int8_cache), prompts, TABLES), exact) < tolerance * error(
        conversation(plain, prompts, TABLES), exact
    )


def exact_decoder(model) -> Decoder:
    """The plain decoder with the quantised weights as floating-point ones."""

    class Dequantised(Tensors):
        def get(self, name):
            found = super().get(name)
            return found.float() * super().get(name + "_scale").unsqueeze(1) if found.dtype == torch.int8 else found

        def __contains__(self, name):
            return not name.endswith("_scale") and super().__contains__(name)

        def names(self):
            return [name for name in super().names() if not name.endswith("_scale")]

    return Decoder(load_spec(model), Weights(Dequantised(model), torch.float32), CONTEXT, torch.float32)


def test_chunks_company_and_threads_change_no_bit(kernels, model):
    prompts = random_prompts()
    together = native(kernels, model)
    cache = together.new_cache(64)
    whole = together.forward([Chunk(p, 0, t, len(p)) for p, t in zip(prompts, TABLES, strict=True)], cache)
    expected = whole.logits.clone().split([len(prompt) for prompt in prompts])
    alone = native(kernels, model, threads=1)
    for prompt, table, logits in zip(prompts, TABLES, expected, strict=True):
        cache, start, parts = alone.new_cache(64), 0, []
        for size in (1, 2, 5, 37, 16, 200):
            part = prompt[start : start + size]
            start += size
            if part:
                parts.append(alone.forward([Chunk(part, start - size, table, len(part))], cache).logits.clone())
        assert torch.equal(torch.cat(parts), logits)


def test_the_same_step_gives_the_same_bits(kernels, model):
    decoder, prompts = native(kernels, model), random_prompts()
    assert torch.equal(conversation(decoder, prompts, TABLES), conversation(decoder, prompts, TABLES))


@pytest.mark.parametrize("int8_cache", [False, True])
def test_blocks_that_are_not_named_are_not_looked_at(kernels, model, int8_cache):
    decoder, prompt, table = native(kernels, model, int8_cache), random_prompts()[2], [33, 31, 50]
    clean, dirty = decoder.new_cache(64), decoder.new_cache(64)
    decoder.forward([Chunk(list(range(256)) * 2, 0, [*range(31), 51])], dirty)
    outputs = [decoder.forward([Chunk(prompt, 0, table, 1)], cache).logits.clone() for cache in (clean, dirty)]
    assert torch.equal(*outputs)


def test_pooled_states_are_those_of_the_plain_decoder(kernels, model):
    prompts, exact = random_prompts(), exact_decoder(model)
    chunks = [Chunk(p, 0, t, pool=i != 1) for i, (p, t) in enumerate(zip(prompts, TABLES, strict=True))]
    decoder = native(kernels, model)
    got, expected = (d.forward(chunks, d.new_cache(64)).pooled for d in (decoder, exact))
    assert got.shape == expected.shape == (3, 64)
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.98


def test_a_build_that_counts_wrong_is_refused(kernels):
    class Wrong:
        def __getattr__(self, name):
            return getattr(kernels, name)

        def nio_linear_apply(self, handle, x, rows, out):
            kernels.nio_linear_apply(handle, x, rows - 1, out)

    assert "wrong by" in library.check(Wrong())


def test_a_build_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(library.KernelError, match=r"amx\.abi3\.so was not built"):
        library.load.__wrapped__("amx")
