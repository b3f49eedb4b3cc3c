"""Evaluating a conversion: what it measures is right, and a gate that should fail does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support import CONTEXT, make_model

from nioserve.cli import main
from nioserve.evaluate.measure import answer, measure_here, score
from nioserve.evaluate.report import Gates, Report, compare
from nioserve.models.loader import load
from nioserve.models.weights import Tensors
from nioserve.texts import CALIBRATION, EVALUATION, tokenised

LENIENT = Gates(min_accuracy=0.5, max_perplexity=1.5, min_agreement=0.5, max_weight_bytes=0.7)


@pytest.fixture(scope="module")
def texts(hf_model):
    return tokenised(EVALUATION, hf_model, 96)


def test_scores_are_those_of_transformers(hf_model, texts):
    from transformers import AutoModelForCausalLM

    some = texts.english[:2] + texts.chats[:1]
    section = score(load(hf_model, "float32", CONTEXT), some)
    model = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float32)
    with torch.inference_mode():
        rows = torch.cat([model(torch.tensor([text])).logits[0, :-1] for text in some])
    targets = [token for text in some for token in text[1:]]
    assert section.targets == targets
    assert section.tops == rows.argmax(-1).tolist()
    expected = rows.log_softmax(-1)[range(len(targets)), targets]
    assert torch.allclose(torch.tensor(section.log_probabilities), expected, atol=1e-4)


def test_long_texts_pass_in_chunks(hf_model, monkeypatch, texts):
    model = load(hf_model, "float32", CONTEXT)
    whole = score(model, texts.english[:2])
    monkeypatch.setattr("nioserve.evaluate.measure._CHUNK_TOKENS", 7)
    pieces = score(model, texts.english[:2])
    assert pieces.tops == whole.tops
    assert pieces.log_probabilities == pytest.approx(whole.log_probabilities, abs=1e-4)


def test_a_model_agrees_with_its_own_answers(hf_model, texts):
    model = load(hf_model, "float32", CONTEXT)
    written, section = answer(model, texts.prompts[:5], None)
    assert section.targets == section.tops
    again, forced = answer(model, texts.prompts[:5], written)
    assert again == written
    assert forced.tops == forced.targets


def test_nothing_is_in_both_sets(hf_model):
    seen = tokenised(CALIBRATION, hf_model, 4096).all()
    held_out = tokenised(EVALUATION, hf_model, 4096).all()
    starts = {tuple(text[:40]) for text in seen if len(text) >= 40}
    assert len(seen) > 20
    assert not any(tuple(text[place : place + 40]) in starts for text in held_out for place in range(len(text)))


@pytest.fixture(scope="module")
def measured(hf_model, int8_model):
    """The source and its conversion."""
    reference = measure_here(hf_model, "source", "float32", None)
    return reference, measure_here(int8_model, "int8", "auto", reference.answers)


def failed(report: Report) -> list[str]:
    return [check.what for check in report.checks if not check.passed]


def test_a_gate_fails_by_itself(measured):
    reference, model = measured
    assert compare(model, reference, LENIENT).passed
    assert failed(compare(model, reference, replace(LENIENT, max_weight_bytes=0.1))) == [
        "weight bytes, share of fp16's"
    ]
    names = failed(compare(model, reference, replace(LENIENT, min_agreement=1.01)))
    assert names == ["agreement of the top token on texts", "agreement of the top token on answers"]
    names = failed(compare(model, reference, replace(LENIENT, max_perplexity=0.1)))
    assert names == ["perplexity of texts, share of the reference's", "perplexity of answers, share of the reference's"]


def test_a_model_costs_nothing_against_itself(measured):
    figures = compare(measured[0], measured[0], Gates()).sections
    assert {(row.relative_accuracy, row.relative_perplexity, row.agreement) for row in figures.values()} == {(1, 1, 1)}


def test_damaged_weights_fail(measured, int8_model, tmp_path):
    damaged = shutil.copytree(int8_model, tmp_path / "damaged")
    tensors = {name: Tensors(int8_model).get(name) for name in Tensors(int8_model).names()}
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].flip(0)
    save_file(tensors, damaged / "model-00001.safetensors", metadata={"format": "pt"})
    (damaged / "manifest.json").unlink()
    names = failed(compare(measure_here(damaged, "x", "auto", measured[0].answers), measured[0], LENIENT))
    assert {"agreement of the top token on texts", "agreement of the top token on answers"} <= set(names)


def test_without_a_reference_nothing_passes_but_the_size_and_the_table_says_why(measured):
    report = compare(measured[1], None, LENIENT)
    assert len(failed(report)) == 5
    assert "Not measured without --reference" in report.as_text()
    assert report.sections["texts"].perplexity > 1


@pytest.mark.slow
def test_the_command_runs_both_models_and_its_status_is_the_verdict(hf_model, int8_model, measured, capsys):
    status = main(["evaluate", "--json", str(int8_model), "--reference", str(hf_model)])
    report = json.loads(capsys.readouterr().out)
    assert status == 0 if report["passed"] else 1
    assert (report["model"], report["reference"]) == ("tiny", hf_model.name)
    expected = compare(measured[1], measured[0], Gates())
    assert report["sections"]["texts"]["agreement"] == pytest.approx(expected.sections["texts"].agreement, abs=0.01)
    assert report["peak_bytes"] > 10e6


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none")]) == 1
    assert "none: does not exist" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_measured_on_prose(tmp_path):
    base = make_model(tmp_path / "base", "llama")
    (base / "chat_template.jinja").unlink()
    texts = tokenised(EVALUATION, base, 96)
    assert texts.chats == []
    assert len(texts.prompts) == 16
