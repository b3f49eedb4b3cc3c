"""Converting a model: deterministic, atomic, verified at each load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support import CONTEXT, EOS, make_model
from test_parity import FAMILIES, GREEDY, prompts, run

from nioserve.cli import main
from nioserve.engine.core import Engine
from nioserve.engine.limits import Limits
from nioserve.models import manifest
from nioserve.models.gguf import GgufTensors
from nioserve.models.loader import load
from nioserve.models.quantize import quantize
from nioserve.models.smoothing import smoothed
from nioserve.models.spec import ModelError, load_spec
from nioserve.models.weights import Tensors
from nioserve.texts import CALIBRATION, sha256_of_texts, tokenised


def logits_of(directory, dtype: str) -> torch.Tensor:
    engine = Engine(load(directory, dtype, CONTEXT), Limits(256, 2, 512, 512))
    found = []
    forward = engine._model.forward

    def listening(chunks, cache):
        output = forward(chunks, cache)
        found.append(output.logits.clone())  # the next step may overwrite them
        return output

    engine._model.forward = listening
    run(engine, prompts(4), 1, GREEDY)
    return torch.cat(found)


def test_the_converted_model_says_nearly_the_same(hf_model, int8_model):
    exact, quantised = logits_of(hf_model, "float32"), logits_of(int8_model, "auto")
    similar = torch.nn.functional.cosine_similarity(exact, quantised)
    assert similar.mean() > 0.99
    assert similar.min() > 0.98


def test_the_manifest_names_format_source_and_every_file(hf_model, int8_model):
    listed = json.loads((int8_model / "manifest.json").read_text())
    assert (listed["format"], listed["format_version"], listed["name"]) == ("nioserve-model", 1, "tiny")
    assert set(listed["files"]) == {path.name for path in int8_model.iterdir()} - {"manifest.json"}
    assert listed["source"]["sha256"]["model.safetensors"] == manifest.sha256_of(hf_model / "model.safetensors")
    assert json.loads((int8_model / "generation_config.json").read_text())["eos_token_id"] == [EOS]


def smoothed_copy(source, target):
    """Write a model with smoothed weights, unquantised."""
    shutil.copytree(source, target)
    spec = load_spec(source)
    texts = tokenised(CALIBRATION, source, 64).all()
    tensors = {name: tensor.to(torch.float32) for name, tensor in smoothed(Tensors(source), spec, texts)}
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target, tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_smoothing_changes_the_weights_and_not_the_model(name, tmp_path):
    family, changes = FAMILIES[name]
    source = make_model(tmp_path / "source", family, **changes)
    target, tensors = smoothed_copy(source, tmp_path / "smoothed")
    before, after = logits_of(source, "float32"), logits_of(target, "float32")
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    moved = {key for key in tensors if not torch.allclose(tensors[key], Tensors(source).get(key))}
    layer = {key.removeprefix("model.layers.0.").removesuffix(".weight") for key in moved if ".layers.0." in key}
    expected = {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # fmt: skip
    assert expected <= layer
    assert ("lm_head.weight" in moved) is not load_spec(source).tie_word_embeddings


def test_smoothing_evens_out_an_outlier_channel(hf_model, tmp_path):
    source = shutil.copytree(hf_model, tmp_path / "source")
    tensors = {name: Tensors(hf_model).get(name).clone() for name in Tensors(hf_model).names()}
    for index in range(2):
        tensors[f"model.layers.{index}.input_layernorm.weight"][3] *= 100
        for part in "qkv":
            tensors[f"model.layers.{index}.self_attn.{part}_proj.weight"][:, 3] /= 100
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    exact = logits_of(source, "float32")
    errors = []
    for smooth in (True, False):
        converted = quantize(source, tmp_path / f"out-{smooth}", smooth=smooth)
        assert ("smoothing" in manifest.read(converted)["quantisation"]) is smooth
        errors.append((logits_of(converted, "auto") - exact).norm())
    assert errors[0] < errors[1] / 2


def test_the_same_source_gives_the_same_bytes_whatever_the_threads(hf_model, int8_model, tmp_path):
    torch.set_num_threads(2)
    try:
        again = quantize(hf_model, tmp_path / "again", "tiny")
    finally:
        torch.set_num_threads(1)
    assert (again / "manifest.json").read_bytes() == (int8_model / "manifest.json").read_bytes()


def test_the_manifest_says_how_the_weights_were_made(int8_model):
    scheme = manifest.read(int8_model)["quantisation"]
    assert set(scheme["smoothing"]["alpha"]) == {"attention", "mlp", "down"}
    assert scheme["smoothing"]["texts_sha256"] == sha256_of_texts(CALIBRATION)
    assert scheme["wide_activations"] == ["down_proj", "lm_head"]


def test_no_matrix_is_left_in_floating_point(int8_model):
    tensors = Tensors(int8_model)
    assert all(tensors.get(name).dtype == torch.int8 for name in tensors.names() if tensors.get(name).ndim == 2)


@pytest.mark.parametrize("name", ["model-00001.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_tampered_file_is_refused_by_name(int8_model, tmp_path, name):
    copy = shutil.copytree(int8_model, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name}: sha256 differs"):
        load(copy, "auto", CONTEXT)


def test_a_half_written_file_is_refused_by_name(int8_model, tmp_path):
    copy = shutil.copytree(int8_model, tmp_path / "copy")
    path = copy / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"model-00001.safetensors: sha256 differs"):
        load(copy, "auto", CONTEXT)


def test_a_missing_tensor_is_named(hf_model, tmp_path, capsys):
    source = shutil.copytree(hf_model, tmp_path / "source")
    missing = "model.layers.1.mlp.up_proj.weight"
    tensors = {name: Tensors(hf_model).get(name) for name in Tensors(hf_model).names() if name != missing}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 1
    assert f"tensor {missing} is missing" in capsys.readouterr().err


def test_missing_and_added_files_are_refused_by_name(int8_model, tmp_path):
    copy = shutil.copytree(int8_model, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    (copy / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"tokenizer.json: is missing; extra.safetensors: is not in the manifest"):
        load(copy, "auto", CONTEXT)


def test_a_newer_format_is_refused(int8_model, tmp_path):
    copy = shutil.copytree(int8_model, tmp_path / "copy")
    listed = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**listed, "format_version": 2}))
    with pytest.raises(ModelError, match="version 2, this release reads"):
        load(copy, "auto", CONTEXT)


def test_what_is_there_is_not_overwritten_and_failures_leave_nothing(hf_model, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["quantize", str(hf_model), str(tmp_path / "full")]) == 1
    assert "is not empty" in capsys.readouterr().err
    broken = shutil.copytree(hf_model, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert main(["quantize", str(broken), str(tmp_path / "out")]) == 1
    assert "gpt_neox" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]


def test_weights_of_another_architecture_are_refused(tmp_path):
    directory = make_model(tmp_path / "qwen3", "qwen3")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"not used by this architecture, such as model\.layers\.1"):
        load(directory, "float32", CONTEXT)


def test_gguf_tensors_come_back_as_they_were(hf_model, tmp_path):
    gguf = pytest.importorskip("gguf")
    source = Tensors(hf_model)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
             "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
             "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight"}  # fmt: skip
    for name, other in names.items():
        values = source.get(name)
        heads = {"attn_q": 4, "attn_k": 2}.get(other.split(".")[2] if "blk" in other else "")
        if heads:  # llama.cpp's converter permutes the rows like this
            rows = values.shape[0]
            values = values.view(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
        writer.add_tensor(other, values.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    read = GgufTensors(tmp_path / "m.gguf", config)
    assert read.names() == sorted(names)
    for name in names:
        assert torch.equal(read.get(name), source.get(name)), name
