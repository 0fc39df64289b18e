"""What every integer grid has to satisfy, whatever its range, width and symmetry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quant.simulation import aimet
from lightning_quant.simulation.fast.short_path import accelerate

aimet.load()
from aimet_torch.quantization.affine import Quantize, QuantizeDequantize  # noqa: E402

WIDTHS = st.sampled_from([4, 8, 16])
ENDS = st.floats(2**-13, 2.0**13, width=32)


def grid(bits: int, symmetric: bool, low: Any, high: Any, *, kind: Any = QuantizeDequantize) -> Any:
    """A quantizer with this range, on the short path; ranges of several channels are lists."""
    low, high = torch.as_tensor(low, dtype=torch.float32), torch.as_tensor(high, dtype=torch.float32)
    shape = (low.numel(), 1) if low.dim() else ()
    signed = symmetric
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    quantizer = kind(shape, qmin=qmin, qmax=qmax, symmetric=symmetric)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high * (2 ** (bits - 1)) / (2 ** (bits - 1) - 1)
    quantizer.set_range(low.reshape(shape), high.reshape(shape))
    if kind is QuantizeDequantize:
        holder = torch.nn.ModuleList([quantizer])
        assert accelerate(holder) == []
    return quantizer


def values(data: st.DataObject, low: float, high: float, count: int = 64) -> Tensor:
    """Numbers around a range, beyond its ends too."""
    inside = st.floats(2 * low, 2 * high, width=32)
    return torch.tensor(data.draw(st.lists(inside, min_size=1, max_size=count)), dtype=torch.float32)


@given(WIDTHS, st.booleans(), ENDS, ENDS, st.data())
@settings(deadline=None, derandomize=True, max_examples=80)
def test_inside_the_range_the_error_is_at_most_half_a_step(
    bits: int, symmetric: bool, low: float, high: float, data: st.DataObject
) -> None:
    quantizer = grid(bits, symmetric, -low, high)
    x = values(data, -low, high)
    step = float(quantizer.get_scale())
    bottom = (quantizer.qmin + float(quantizer.get_offset())) * step
    top = (quantizer.qmax + float(quantizer.get_offset())) * step
    error = (quantizer(x) - x).abs()
    inside = (x >= bottom) & (x <= top)
    # the numbers themselves are rounded to 24 bits
    slack = 4 * torch.finfo(torch.float32).eps * max(abs(bottom), abs(top))
    assert (error[inside] <= step / 2 + slack).all()
    # beyond, the nearest end is taken
    assert (quantizer(x)[x > top] >= top - slack).all()
    assert (quantizer(x)[x < bottom] <= bottom + slack).all()


@given(WIDTHS, st.booleans(), ENDS, ENDS, st.data())
@settings(deadline=None, derandomize=True, max_examples=80)
def test_rounding_twice_changes_nothing_and_order_is_kept(
    bits: int, symmetric: bool, low: float, high: float, data: st.DataObject
) -> None:
    quantizer = grid(bits, symmetric, -low, high)
    x = values(data, -low, high).sort().values
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    assert (once.diff() >= 0).all()


@given(WIDTHS, st.booleans(), ENDS, ENDS)
@settings(deadline=None, derandomize=True, max_examples=80)
def test_zero_stays_zero(bits: int, symmetric: bool, low: float, high: float) -> None:
    """Padding and ReLU put zeros everywhere: every grid has an integer for it."""
    quantizer = grid(bits, symmetric, -low, high)
    assert float(quantizer(torch.zeros(1))) == 0
    if symmetric:
        assert float(quantizer.get_offset()) == 0


@given(WIDTHS, st.booleans(), st.lists(ENDS, min_size=2, max_size=5), st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_each_channel_is_rounded_as_it_would_be_alone(
    bits: int, symmetric: bool, ends: list[float], data: st.DataObject
) -> None:
    together = grid(bits, symmetric, [-end for end in ends], ends)
    x = torch.stack([values(data, -end, end, 1).expand(3) for end in ends])
    alone = [grid(bits, symmetric, -end, end)(row) for end, row in zip(ends, x, strict=True)]
    assert torch.equal(together(x), torch.stack(alone))


@given(st.sampled_from([4, 8]), st.booleans(), ENDS, ENDS, st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_integers_stand_for_the_simulated_numbers(
    bits: int, symmetric: bool, low: float, high: float, data: st.DataObject
) -> None:
    simulated = grid(bits, symmetric, -low, high)
    integers = grid(bits, symmetric, -low, high, kind=Quantize)
    x = values(data, -low, high)
    found = integers(x).as_subclass(Tensor)
    assert torch.equal(found, found.round())
    assert found.min() >= integers.qmin
    assert found.max() <= integers.qmax
    back = (found + simulated.get_offset()) * simulated.get_scale()
    assert torch.allclose(back, simulated(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, float("inf"), float("-inf")])
def test_extremes_end_at_the_ends(value: float) -> None:
    quantizer = grid(8, False, -1.0, 3.0)
    x = torch.tensor([value, -value])
    rounded = quantizer(x)
    assert torch.isfinite(rounded).all()
    assert float(rounded.min()) >= -1.01
    assert float(rounded.max()) <= 3.01
    assert (rounded[x > 3] > 2.99).all()
    assert (rounded[x < -1] < -0.99).all()
