"""Small random models, a small tokeniser, and a real `nioserve serve` in front of them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
from pathlib import Path

import pytest
import torch
from support import Service, make_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_logging():
    """Undo what a command's logging set-up does to the test process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory) -> Path:
    """A small Llama as a Hugging Face directory, in float32."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def int8_model(hf_model, tmp_path_factory) -> Path:
    """The same, converted."""
    from nioserve.models.quantize import quantize

    return quantize(hf_model, tmp_path_factory.mktemp("converted") / "tiny-int8", "tiny")


@pytest.fixture(scope="session")
def service(hf_model, tmp_path_factory):
    """A running service that tests only ask, and never harm."""
    with Service(tmp_path_factory.mktemp("service"), hf_model) as running:
        yield running


@pytest.fixture
def start_service(hf_model, tmp_path):
    """Start services of one's own, with other settings; they are ended with the test."""
    started: list[Service] = []

    def start(**settings) -> Service:
        directory = tmp_path / f"service-{len(started)}"
        directory.mkdir()
        started.append(Service(directory, hf_model, **settings))
        return started[-1].__enter__()

    yield start
    for running in started:
        running.__exit__()
