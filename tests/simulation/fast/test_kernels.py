"""The compiled fake quantization against AIMET's own, number by number."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_quant.simulation import aimet
from lightning_quant.simulation.fast import kernels

aimet.load()

from aimet_torch.quantization.affine import QuantizeDequantize  # noqa: E402

from lightning_quant.simulation.fast.short_path import accelerate, slow_down  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw: Any) -> tuple[QuantizeDequantize, Tensor, Tensor]:
    """A quantizer with a range, numbers and the gradient of what comes out."""
    shape = draw(st.sampled_from([(1,), (7,), (5, 3), (2, 4, 5, 3), (1, 3, 17, 33), (2, 2, 130, 131), (4, 0, 3)]))
    bits = draw(st.sampled_from([2, 4, 8, 16]))
    symmetric = draw(st.booleans())
    channel_axis = draw(st.sampled_from([None, *range(len(shape))]))
    of_range: tuple[int, ...] = ()
    if channel_axis is not None and shape[channel_axis]:
        of_range = tuple(size if axis == channel_axis else 1 for axis, size in enumerate(shape))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitude = 10.0 ** draw(st.sampled_from([-40, -30, -6, -2, 0, 3, 8]))
    numbers = torch.randn(shape, generator=generator) * magnitude
    if draw(st.booleans()):
        numbers = numbers.relu()
    if draw(st.booleans()):
        numbers[torch.rand(shape, generator=generator) < 0.2] = 0
    if len(shape) == 4 and draw(st.booleans()):
        numbers = numbers.to(memory_format=torch.channels_last)
    quantizer = QuantizeDequantize(of_range, bits, symmetric)
    share = draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))  # of the numbers that the range covers
    high = torch.rand(of_range, generator=generator) * 3 * magnitude * share
    low = -torch.rand(of_range, generator=generator) * 3 * magnitude * share * draw(st.sampled_from([0, 1]))
    quantizer.set_range(-high if symmetric else low, high)
    return quantizer, numbers, torch.randn(shape, generator=generator)


def run(
    module: nn.Module, numbers: Tensor, grad: Tensor, learned: bool, quantizer: Any = None, *, leaf: bool = False
) -> tuple[Tensor, ...]:
    """Output, gradient of the input and, if they learn, of the ends of the range.

    Of leaves, such as weights, the kernel keeps the numbers themselves for the backward pass; of others codes or bits.
    """
    quantizer = module if quantizer is None else quantizer
    quantizer.requires_grad_(learned).zero_grad()
    numbers = numbers.clone().requires_grad_()
    output = module(numbers if leaf else numbers.clone()).as_subclass(Tensor)
    output.backward(grad)
    gradients = (quantizer.min.grad, quantizer.max.grad)
    assert numbers.grad is not None
    return (output.detach(), numbers.grad, *(g for g in gradients if g is not None))


@SETTINGS
@given(cases())
def test_outputs_and_gradients_are_those_of_aimet(case: Any) -> None:
    quantizer, numbers, grad = case
    for learned, leaf in itertools.product((True, False), (True, False)):
        slow_down(quantizer)
        theirs = run(quantizer, numbers, grad, learned, leaf=leaf)
        accelerate(quantizer)
        ours = run(quantizer, numbers, grad, learned, leaf=leaf)
        assert len(ours) == len(theirs) == (4 if learned else 2)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[0].stride() == numbers.stride() or numbers.numel() == 0 or quantizer.min.numel() > 1
    with torch.no_grad():
        mine = quantizer(numbers)
        slow_down(quantizer)
        assert torch.equal(mine, quantizer(numbers).as_subclass(Tensor))


@SETTINGS
@given(cases(), st.booleans())
def test_gradients_of_ranges(case: Any, leaf: bool) -> None:
    """Against the formula in float64; sums of numbers that cancel are compared to what was added up."""
    quantizer, numbers, grad = case
    accelerate(quantizer)
    *_, low_grad, high_grad = run(quantizer, numbers, grad, True, leaf=leaf)
    low, x, g = (t.detach().double() for t in (quantizer.min, numbers, grad))
    qmin, qmax = quantizer.qmin, quantizer.qmax
    with torch.no_grad():  # the whole numbers, decided in float32
        scale32, offset32 = quantizer.get_scale(), quantizer.get_offset()
        rounded = torch.round(numbers / scale32)
        inside = (qmin <= rounded - offset32) & (rounded - offset32 <= qmax)
    scale, offset = scale32.double(), offset32.double()
    terms = g * torch.where(inside, rounded.double() - x / scale, rounded.double().clamp(offset + qmin, offset + qmax))
    by_offset = torch.where(inside, 0.0, g * scale)
    free = torch.round(quantizer.min.detach() / scale32) - qmin
    learns = not quantizer.symmetric and (free > -qmax) & (free < -qmin)
    raw = (quantizer.max.detach() - quantizer.min.detach()) / (qmax - qmin)
    sign = torch.where(raw.abs() < scale32, 0.0, raw.double().sign())  # a range too narrow has the smallest scale
    sign = torch.where(raw.abs() == _smallest(quantizer), 0.0, sign)

    def total(values: Tensor) -> Tensor:
        return values.sum_to_size(low.shape) if low.dim() else values.sum()

    offset_sum = total(by_offset) * learns
    scale_sum = total(terms) - offset_sum * low / scale**2
    size = total(terms.abs()) + total(by_offset.abs()) * (low / scale**2).abs() * learns
    expected_high = scale_sum * sign / (qmax - qmin)
    expected_low = offset_sum / scale - expected_high
    allowed = size / (qmax - qmin) * 2e-5 + total(by_offset.abs()) * learns / scale * 2e-5
    assert (high_grad - expected_high).abs().le(1e-3 * expected_high.abs() + allowed + 1e-30).all()
    assert (low_grad - expected_low).abs().le(1e-3 * expected_low.abs() + allowed + 1e-30).all()


def _smallest(quantizer: QuantizeDequantize) -> float:
    from aimet_torch.common.quantsim import _get_minimum_scale

    return torch.tensor(_get_minimum_scale(quantizer.qmax - quantizer.qmin), dtype=torch.float32).item()


def test_saved_activations() -> None:
    """Two bytes a number, or a bit where the range does not learn; nothing for a weight."""
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    accelerate(quantizer)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    weight = torch.randn(64, 125, requires_grad=True)
    numbers = weight.clone()
    for learned, expected in ((True, 2 * 8000), (False, 1000)):
        quantizer.requires_grad_(learned)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            quantizer(numbers)
        assert kept == [expected, 4, 4]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("module", [nn.ReLU(), nn.Hardswish()])
def test_fused_activations(module: nn.Module, learned: bool) -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(torch.tensor(-0.4), torch.tensor(2.5))
    accelerate(quantizer)
    numbers = torch.linspace(-5, 5, 10_007)
    grad = torch.randn(10_007, generator=torch.Generator().manual_seed(0))
    numbers[:3] = torch.tensor([-3.0, 3.0, 0.0])
    expected = run(nn.Sequential(module, quantizer), numbers, grad, learned, quantizer)
    kind = kernels.Activation[type(module).__name__.upper()]

    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return quantizer.after(x, kind)

    actual = run(Fused(), numbers, grad, learned, quantizer)
    for mine, theirs in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(actual[2:], expected[2:], rtol=1e-3, atol=1e-5)


def test_nan_stays_nan() -> None:
    """PyTorch's kernel makes the lowest number of the range of it, and so hides that a network broke."""
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    numbers = torch.tensor([0.5, float("nan"), float("inf"), -float("inf")])
    with torch.no_grad():
        hidden = quantizer(numbers).as_subclass(Tensor)
        accelerate(quantizer)
        shown = quantizer(numbers)
    assert not hidden.isnan().any()
    assert shown.isnan().tolist() == [False, True, False, False]
    assert shown[2] == quantizer.get_max()
    assert shown[3] == quantizer.get_min()
    learned = quantizer(numbers)
    assert torch.equal(learned.isnan(), shown.isnan())


def test_numbers_beyond_integers_are_clipped() -> None:
    """PyTorch's kernel converts to 64-bit integers first, and 1e30 overflows to the lowest number there."""
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    accelerate(quantizer)
    with torch.no_grad():
        assert torch.equal(
            quantizer(torch.tensor([1e30, -1e30])), torch.stack([quantizer.get_max(), quantizer.get_min()])
        )


def test_second_derivatives_are_refused() -> None:
    """Rather than zero, which is what would come out."""
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    accelerate(quantizer)
    numbers = torch.randn(9, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*LIGHTNING_QUANT_STOCK=1"):
        torch.autograd.grad(quantizer(numbers).square().sum(), numbers, create_graph=True)


@pytest.mark.torture
def test_a_killed_build_is_repeated(tmp_path: Path) -> None:
    """PyTorch would wait for ever for the process that held its lock file."""
    code = "from lightning_quant.simulation.fast import kernels; print(kernels.unavailable())"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    first = subprocess.Popen(command, env=environment)
    while not list(tmp_path.rglob("build.ninja")):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not list(tmp_path.rglob("*.so"))
    (left,) = tmp_path.rglob("build.ninja")
    (left.parent / "lock").touch()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "None"


def test_another_installation_of_the_same_version_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two virtual environments would build the library anew for each other, each time: ninja compares paths."""
    built, loaded = [], []

    def build(name: str, sources: list[str], *, build_directory: str, **_: object) -> None:
        built.append(sources)
        Path(build_directory, f"{name}.so").touch()

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.load", build)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    kernels._load()
    monkeypatch.setattr(kernels, "_SOURCES", [Path(shutil.copy(path, tmp_path)) for path in kernels._SOURCES])
    kernels._load()
    assert len(built) == len(loaded) == 1


def test_without_a_compiler_the_reason_is_reported(tmp_path: Path) -> None:
    code = "from lightning_quant.simulation.fast import kernels; print(kernels.unavailable())"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "building them failed" in done.stdout


@pytest.mark.slow
def test_nothing_is_built_before_it_is_needed(tmp_path: Path) -> None:
    """A machine that trains on its GPU has no use for kernels of the CPU; a network is quantized on the CPU."""
    code = "from tests.helpers.networks import Body, quantized; quantized(Body())"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert not list(tmp_path.iterdir())


def test_sums_do_not_depend_on_threads() -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    accelerate(quantizer)
    numbers, grad = torch.randn(2, 64, 64, 65), torch.randn(2, 64, 64, 65)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(quantizer, numbers, grad, True))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for mine, theirs in zip(result, results[0], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_left_to_aimet(dtype: torch.dtype) -> None:
    quantizer = QuantizeDequantize((), 8, False)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    numbers, grad = torch.randn(5, 7, dtype=dtype), torch.randn(5, 7, dtype=dtype)
    theirs = run(quantizer, numbers, grad, True)
    accelerate(quantizer)
    ours = run(quantizer, numbers, grad, True)
    assert ours[0].dtype is dtype
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
def test_without_the_kernels_aimet_does_the_work() -> None:
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from tests.helpers.networks import Body, calibrated, images\n"
        "network = calibrated(Body())\n"
        "print('sum', float(network(images()).sum()))\n"
    )
    said = []
    for environment in ({"LIGHTNING_QUANT_STOCK": "1"}, {}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        said.append((done.stdout.rpartition("sum")[2], "on AIMET's own kernels" in done.stderr))
    assert said[0][0] == said[1][0]
    assert [reported for _, reported in said] == [True, False]
