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


@pytest.mark.parametrize(("wide", "error"), [(False, 1 / 255), (True, 1 / 65535)])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e4, 1e30])
def test_activations_are_off_by_half_a_step_at_most(wide, error, spread):
    torch.manual_seed(1)
    weight, scale = quantise_rows(torch.randn(24, 96))
    x = torch.cat([torch.randn(5, 96), torch.rand(5, 96), 3 + 0.01 * torch.randn(5, 96)]) * spread
    x[0, 0] = 40 * spread  # an outlier widens the step of its own row alone
    got = Int8Linear(weight, scale, None, wide=wide)(x).double()
    dequantised = weight.double() * scale.double().unsqueeze(1)
    exact = x.double() @ dequantised.t()
    half_step = (x.amax(1) - x.amin(1)).double().unsqueeze(1) * error / 2
    # And float32's rounding of the sums, which is all that is left where the range is wide.
    rounding = 1e-6 * x.double().abs().sum(1, keepdim=True) * dequantised.abs().amax()
    assert ((got - exact).abs() <= half_step * dequantised.abs().sum(1) * 1.01 + rounding).all()


def test_wide_activations_lose_next_to_nothing():
    torch.manual_seed(2)
    weight, scale = quantise_rows(torch.randn(48, 256))
    x, bias = torch.randn(9, 256) ** 3, torch.randn(48)
    exact = x @ (weight * scale.unsqueeze(1)).t() + bias
    narrow, wide = (Int8Linear(weight, scale, bias, wide=wide)(x) for wide in (False, True))
    assert (wide - exact).norm() / exact.norm() < 1e-4
    assert (wide - exact).norm() < (narrow - exact).norm() / 50


@pytest.mark.parametrize("wide", [False, True])
def test_rows_without_a_range_are_exact(wide):
    weight, scale = quantise_rows(torch.randn(8, 32))
    x = torch.stack([torch.zeros(32), torch.full((32,), 2.5), torch.full((32,), -1e-20), torch.full((32,), 1e20)])
    exact = x.double() @ (weight.double() * scale.double().unsqueeze(1)).t()
    assert torch.allclose(Int8Linear(weight, scale, None, wide=wide)(x).double(), exact, rtol=1e-4, atol=1e-10)
