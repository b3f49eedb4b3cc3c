"""INT8 products are exact, and a kernel that is not is refused."""

from __future__ import annotations

import pytest
import torch

from nioserve.models import int8
from nioserve.models.linear import Int8Linear, quantise_rows


@pytest.mark.parametrize("packer", [int8.pack_onednn, int8.pack_int_mm])
def test_both_kernels_count_right(packer):
    assert int8.check(packer) is None


def test_a_kernel_that_saturates_is_refused_and_the_next_one_taken(monkeypatch):
    def saturating(weight, scale):
        def product(activations):
            exact = activations.to(torch.int32) @ weight.to(torch.int32).t()
            return exact.clamp(-(2**20), 2**20).float() * scale

        return product

    assert "wrong by" in int8.check(saturating)
    saturating.__name__ = "saturating"
    monkeypatch.setattr(int8, "pack_onednn", saturating)
    int8.best_packer.cache_clear()
    assert int8.best_packer() is int8.pack_int_mm
    int8.best_packer.cache_clear()


def test_a_missing_operation_is_refused(monkeypatch):
    monkeypatch.setattr(int8, "pack_int_mm", lambda *_: (_ for _ in ()).throw(AttributeError("no such op")))
    assert int8.check(int8.pack_int_mm) == "no such op"


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_a_layer_is_close_to_the_dense_one(shift):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 96), torch.randn(48), torch.randn(7, 96) + shift
    layer = Int8Linear(*quantise_rows(weight), bias)
    exact = x @ weight.t() + bias
    assert (layer(x) - exact).norm() / exact.norm() < 0.015


def test_constant_and_zero_rows_survive():
    weight = torch.randn(8, 16)
    weight[3] = 0
    layer = Int8Linear(*quantise_rows(weight), None)
    x = torch.stack([torch.zeros(16), torch.full((16,), 2.5)])
    assert torch.allclose(layer(x), x @ weight.t(), atol=0.2)
    assert torch.isfinite(layer(x)).all()
