"""The compiled kernels on a GPU against the C++ kernel on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_quant.simulation.fast import biases, gpu, kernels
from lightning_quant.simulation.fast.kernels import Activation
from tests.simulation.fast.triton_cases import COMMON, GRIDS, Results, assert_alike, equal, numbers, on_cpu, run

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
    pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable())),
]
SHAPES = ((), (7,), (2, 3, 5, 7), (0, 3), (9001,), (3, 64, 129, 131))


def on_gpu(*args: Any, **kwargs: Any) -> Results:
    """As :func:`run` with the GPU's kernels; what comes back is on the CPU."""
    moved = [value.cuda() if isinstance(value, Tensor) else value for value in args]
    made = run(gpu.fake_quantize, *moved, **kwargs)
    return Results(*(None if value is None else value.cpu() for value in made))  # type: ignore[arg-type]


def test_the_kernels_are_there() -> None:
    assert gpu.unavailable() is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_one_range(shape: tuple[int, ...], grid: str) -> None:
    *settings, low, high = GRIDS[grid]
    ends = torch.tensor(low), torch.tensor(high)
    x, grad = numbers(shape)
    for activation, learned, leaf in itertools.product(COMMON, (True, False), (True, False)):
        ours = on_gpu(x, *ends, settings, grad, learned=learned, leaf=leaf, activation=activation)
        theirs = run(on_cpu, x, *ends, settings, grad, learned=learned, leaf=leaf, activation=activation)
        assert_alike(ours, theirs, grad, codes=learned and not leaf)


def test_quotients_on_the_border_are_rounded_as_on_the_cpu() -> None:
    """Numbers next to the middle between two grid points, where an inexact division tips over."""
    low, high = torch.tensor(-0.737), torch.tensor(1.913)
    scale = (high - low) / 255
    middles = (torch.arange(-600, 900) + 0.5) * scale
    x = torch.cat([middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))])
    for learned in (True, False):
        ours = on_gpu(x, low, high, (0, 255, False), torch.ones_like(x), learned=learned)
        theirs = run(on_cpu, x, low, high, (0, 255, False), torch.ones_like(x), learned=learned)
        assert equal(ours.output, theirs.output)
        assert equal(ours.x, theirs.x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64, 48, 3, 3), 0), ((64, 48, 3, 3), 1), ((512, 512, 3, 3), 0), ((512, 512, 3, 3), 1), ((96, 1, 5, 5), 0)],
)
def test_a_range_for_each_channel(
    shape: tuple[int, ...], axis: int, memory_format: torch.memory_format, learned: bool
) -> None:
    x, grad = torch.randn(shape), torch.randn(shape)
    x = x.to(memory_format=memory_format)
    high = x.abs().amax([one for one in range(4) if one != axis], keepdim=True) * 0.9
    high.view(-1)[0] = 0
    ends = -high * 8 / 7, high
    ours = on_gpu(x, *ends, (-8, 7, True), grad, learned=learned, leaf=True)
    assert_alike(ours, run(on_cpu, x, *ends, (-8, 7, True), grad, learned=learned, leaf=True), grad, codes=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
def test_half_precision_is_computed_with_in_float32(dtype: torch.dtype, learned: bool) -> None:
    x, grad = (tensor.to(dtype) for tensor in numbers((3, 64, 33, 35)))
    for (_, grid), activation in itertools.product(GRIDS.items(), COMMON):
        *settings, low, high = grid
        ends = torch.tensor(low), torch.tensor(high)
        ours = on_gpu(x, *ends, settings, grad, learned=learned, activation=activation)
        theirs = run(on_cpu, x.float(), *ends, settings, grad.float(), learned=learned, activation=activation)
        assert equal(ours.output, theirs.output.to(dtype))
        assert equal(ours.x, theirs.x.to(dtype))
        if ours.low is not None and theirs.low is not None and not theirs.low.isnan():
            assert ours.low.dtype is torch.float32
            noise = grad.float().square().sum().sqrt() / 100
            assert (ours.low - theirs.low).abs() <= noise + 1e-3 * theirs.low.abs()


@pytest.mark.parametrize("kept", ["codes", "input"])
def test_sums_are_the_same_in_every_run(kept: str) -> None:
    x, grad = torch.randn(8, 64, 128, 128, device="cuda"), torch.randn(8, 64, 128, 128, device="cuda")
    ends = torch.tensor(-0.7, device="cuda"), torch.tensor(1.9, device="cuda")
    runs = [
        run(gpu.fake_quantize, x, *ends, (0, 255, False), grad, learned=True, leaf=kept == "input") for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True) if a is not None and b is not None)
    # and right: against float64
    reference = [tensor.double() for tensor in (x, grad, *ends)]
    scale = (ends[1] - ends[0]).div(255)
    rounded = (x / scale).round()
    offset = (ends[0] / scale).round()
    q = rounded - offset
    inside = (q >= 0) & (q <= 255)
    error = torch.where(inside, rounded.double() - reference[0] / scale.double(), q.clamp(0, 255).double() + offset)
    by_offset = torch.where(inside, 0.0, reference[1]).sum() * scale.double()
    by_scale = (reference[1] * error).sum() - by_offset * reference[2] / scale.double().square()
    low, high = runs[0].low, runs[0].high
    assert low is not None
    assert high is not None
    torch.testing.assert_close(high.double(), by_scale / 255, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(low.double(), by_offset / scale.double() - by_scale / 255, rtol=1e-3, atol=1e-2)


def test_silu_is_pytorchs_up_to_its_last_bits() -> None:
    x, grad = torch.randn(9000, device="cuda"), torch.randn(9000, device="cuda")
    ends = torch.tensor(-0.28, device="cuda"), torch.tensor(2.0, device="cuda")
    for learned in (True, False):
        ours = run(gpu.fake_quantize, x, *ends, (0, 255, False), grad, learned=learned, activation=Activation.SILU)
        theirs = run(
            lambda x, *args: gpu.fake_quantize(torch.nn.functional.silu(x), *args), x, *ends, (0, 255, False), grad,
            learned=learned,
        )  # fmt: skip
        assert ((ours.output - theirs.output).abs() <= 1.01 * (ends[1] - ends[0]) / 255).all()
        assert (ours.output != theirs.output).float().mean() < 0.01
        assert ((ours.x - theirs.x).abs() > 1e-4).float().mean() < 0.01


def test_more_than_two_billion_numbers() -> None:
    """Places beyond 32-bit integers."""
    count = 2**31 + 4096 * 3 + 5
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    x[-5:] = torch.tensor([9.0, -9.0, 0.5, 1.0, -0.2])
    low, high = torch.tensor(-1.0, device="cuda"), torch.tensor(1.0, device="cuda")
    for learned in (True, False):
        low.requires_grad_(learned)
        input = x.detach().requires_grad_()
        made = gpu.fake_quantize(input.view(-1), low, high, 0, 255, False, 1e-8)
        expected = on_cpu(x[-5:].float().cpu(), low.detach().cpu(), high.cpu(), 0, 255, False, 1e-8)
        assert torch.equal(made[-5:].detach().cpu(), expected.bfloat16())
        made.backward(torch.ones_like(made))
        assert input.grad is not None
        assert input.grad[-5:].tolist() == [0, 0, 1, 1, 1]
        del made, input


def test_a_bias_is_rounded_as_on_the_cpu() -> None:
    """In units of both scales, with 64 bits in between; groups have the same scales."""
    bias = torch.randn(3000) * torch.logspace(-6, 3, 3000)
    for channels, steps in ((3000, 255.0), (1000, 15.0), (1, 255.0)):
        high = torch.rand(channels, 1, 1, 1) + 1e-3
        given = (bias, torch.tensor(-0.3), torch.tensor(1.1), -high, high)
        grids = 65535.0, 1e-8, steps, 1e-8
        leaf = bias.cuda().requires_grad_()
        on_gpu = biases.round_bias(leaf, *(one.cuda() for one in given[1:]), *grids)
        assert torch.equal(on_gpu.cpu(), biases.round_bias(*given, *grids))
        on_gpu.sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(leaf))
