"""ONNX Runtime behind the same engine: what it computes, and a chat through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import Service, events, text_of

pytest.importorskip("onnxruntime_genai", reason="needs nioserve[export]")

from nioserve.backends.export import export
from nioserve.models.batch import Chunk
from nioserve.models.loader import load
from nioserve.models.spec import ModelError


@pytest.fixture(scope="module")
def onnx_model(hf_model, tmp_path_factory) -> Path:
    return export(hf_model, tmp_path_factory.mktemp("exported") / "tiny-onnx", "tiny")


@pytest.fixture(scope="module")
def model(onnx_model):
    return load(onnx_model, "auto", 256)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def blocks(first: int, tokens: int) -> list[int]:
    return list(range(first, first + -(-tokens // 16)))


def greedy(model, prompts: list[list[int]], count: int, piece: int = 1000) -> list[list[int]]:
    """Generate for all prompts together, prompts cut into pieces, each sequence with eight blocks of its own."""
    cache = model.new_cache(8 * len(prompts))
    rows, computed = [list(tokens) for tokens in prompts], [0] * len(prompts)
    while any(len(row) < len(start) + count for row, start in zip(rows, prompts, strict=True)):
        chunks, live = [], [i for i, row in enumerate(rows) if len(row) < len(prompts[i]) + count]
        for i in live:
            part = rows[i][computed[i] : computed[i] + piece]
            computed[i] += len(part)
            ends = computed[i] == len(rows[i])
            chunks.append(Chunk(part, computed[i] - len(part), blocks(8 * i, computed[i]), int(ends)))
        tokens = iter(model.forward(chunks, cache).logits.argmax(dim=-1).tolist())
        for i, chunk in zip(live, chunks, strict=True):
            if chunk.logits:
                rows[i].append(next(tokens))
    return [row[len(start) :] for row, start in zip(rows, prompts, strict=True)]


def test_its_logits_are_close_to_full_precision(model, hf_model):
    reference = load(hf_model, "float32", 256)
    tokens = prompt(100, 1)
    chunks = [Chunk(tokens, 0, blocks(0, 100), 100)]
    ours, theirs = (m.forward(chunks, m.new_cache(8)).logits for m in (model, reference))
    assert ours.shape == theirs.shape
    assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.99
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.85


def test_a_batch_of_mixed_lengths_gives_what_each_gives_alone(model):
    prompts = [prompt(length, length) for length in (5, 17, 33, 60, 1)]
    together = greedy(model, prompts, 40)
    assert together == [greedy(model, [tokens], 40)[0] for tokens in prompts]


def test_sequences_leave_and_join_while_others_run(model):
    """Lanes change hands at every step here, and have to be filled from the blocks again."""
    cache, alone = model.new_cache(32), [greedy(model, [prompt(20, seed)], 12)[0] for seed in range(4)]
    rows = [prompt(20, seed) for seed in range(4)]
    for i in range(4):
        out = model.forward([Chunk(rows[i], 0, blocks(8 * i, 20), 1)], cache)
        rows[i].append(int(out.logits.argmax()))
    for step in range(11 * 4):
        live = [i for i in range(4) if len(rows[i]) < 32 and (i + step) % 3]  # others rest in this step
        if not live:
            continue
        chunks = [Chunk(rows[i][-1:], len(rows[i]) - 1, blocks(8 * i, len(rows[i])), 1) for i in reversed(live)]
        for i, token in zip(reversed(live), model.forward(chunks, cache).logits.argmax(-1).tolist(), strict=True):
            rows[i].append(token)
    assert [row[20:] for row in rows] == alone


def test_blocks_may_be_shared(model):
    """Two sequences with one beginning use the same blocks for it, as the prefix cache has it."""
    start, cache = prompt(32, 7), model.new_cache(8)
    model.forward([Chunk(start, 0, [0, 1], 0)], cache)
    ends = [prompt(6, 8), prompt(6, 9)]
    shared = model.forward([Chunk(end, 32, [0, 1, 2 + i], 6) for i, end in enumerate(ends)], cache).logits
    whole = [model.forward([Chunk(start + end, 0, [4, 5, 6], 6)], cache).logits for end in ends]
    torch.testing.assert_close(shared, torch.cat(whole), atol=0.05, rtol=0.01)


def test_hidden_states_are_summed_up_for_embeddings(model, hf_model):
    chunks = [Chunk(prompt(12, 3), 0, [0], 0, pool=True), Chunk(prompt(9, 4), 0, [1], 1, pool=True)]
    reference = load(hf_model, "float32", 256)
    ours, theirs = (m.forward(chunks, m.new_cache(2)) for m in (model, reference))
    assert ours.logits.shape == (1, model.spec.vocab_size)
    assert (torch.cosine_similarity(ours.pooled, theirs.pooled) > 0.99).all()


def test_a_chat_goes_through_it(onnx_model, tmp_path):
    with Service(tmp_path, onnx_model) as service:
        answer = service.chat("What is it?", max_tokens=12).json()
        assert answer["usage"]["completion_tokens"] <= 12
        with service.stream("What is it?", max_tokens=12) as response:
            assert text_of(events(response)) == answer["choices"][0]["message"]["content"]
        drawn = [service.chat("Draw", temperature=1, seed=5, max_tokens=8).json()["choices"] for _ in range(2)]
        assert drawn[0] == drawn[1]
        with service.stream("Never read", max_tokens=2000, ignore_eos=True) as response:
            next(response.iter_lines())
        assert service.chat("And on", max_tokens=2).status_code == 200


def test_a_changed_graph_is_refused_by_its_name(onnx_model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in onnx_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with (copy / "model.onnx.data").open("r+b") as data:
        data.write(b"\xff")
    with pytest.raises(ModelError, match=r"model\.onnx\.data: sha256 differs"):
        load(copy, "auto", 256)


def test_an_export_overwrites_nothing_and_names_what_it_cannot_do(hf_model, onnx_model, tmp_path):
    with pytest.raises(ModelError, match="is not empty"):
        export(hf_model, onnx_model)
    with pytest.raises(ModelError, match="does not exist"):
        export(tmp_path / "nothing", tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    for file in hf_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(ModelError, match="gpt_neox"):
        export(other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_command_says_what_to_install(hf_model, tmp_path):
    code = (
        "import sys; sys.modules['onnxruntime_genai'] = None\n"
        "from nioserve.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "export", str(hf_model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'nioserve[export]'" in done.stderr
