"""The kernels for GPUs in Triton's interpreter against the C++ kernel, number by number; `tests/gpu` has real ones."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lightning_quant.simulation.fast import gpu, kernels
from lightning_quant.simulation.fast.kernels import Activation
from tests.helpers.members import in_turn
from tests.simulation.fast.triton_cases import COMMON, GRIDS, SHAPES, assert_alike, equal, numbers, on_cpu, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch for CUDA only"),
    pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable())),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the real kernels are tested, in tests/gpu"),
]


@pytest.mark.parametrize(("shape", "grid"), in_turn(SHAPES, GRIDS), ids=str)
def test_one_range(shape: tuple[int, ...], grid: str) -> None:
    *settings, low, high = GRIDS[grid]
    ends = torch.tensor(low), torch.tensor(high)
    x, grad = numbers(shape)
    for activation, learned, leaf in itertools.product(COMMON, (True, False), (True, False)):
        ours = run(gpu.fake_quantize, x, *ends, settings, grad, learned=learned, leaf=leaf, activation=activation)
        theirs = run(on_cpu, x, *ends, settings, grad, learned=learned, leaf=leaf, activation=activation)
        assert_alike(ours, theirs, grad, codes=learned and not leaf)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_ranges_propagate(bad: float) -> None:
    x, _ = numbers((20,))
    for low, high in ((-1.0, bad), (-bad, 1.0)):
        made = gpu.fake_quantize(x, torch.tensor(low), torch.tensor(high), 0, 255, False, 1e-8)
        expected = on_cpu(x, torch.tensor(low), torch.tensor(high), 0, 255, False, 1e-8)
        assert equal(made, expected)


@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
def test_a_range_per_channel(axis: int, memory_format: torch.memory_format, learned: bool) -> None:
    x, grad = numbers((6, 5, 3, 4))
    x = x.nan_to_num(0.5, 1.0, -1.0).to(memory_format=memory_format)
    high = x.abs().amax([one for one in range(4) if one != axis], keepdim=True) * 0.9
    high.view(-1)[0] = 0  # a channel of zeros
    ours, theirs = (
        run(kernel, x, -high * 8 / 7, high, (-8, 7, True), grad, learned=learned, leaf=True)
        for kernel in (gpu.fake_quantize, on_cpu)
    )
    assert_alike(ours, theirs, grad, codes=False)
    assert axis or ours.output.stride() == x.stride()  # another axis is brought to the front, and back


def test_rows_longer_than_a_block() -> None:
    x, grad = torch.randn(3, 2500), torch.randn(3, 2500)
    high = torch.tensor([[1.0], [0.5], [2.0]])
    ours, theirs = (
        run(kernel, x, -high, high, (-128, 127, True), grad, learned=True, leaf=True)
        for kernel in (gpu.fake_quantize, on_cpu)
    )
    assert_alike(ours, theirs, grad, codes=False)


def test_ranges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 1\) do not fit a tensor of shape \(2, 5\)"):
        gpu.fake_quantize(torch.zeros(2, 5), torch.zeros(3, 1), torch.ones(3, 1), 0, 255, False, 1e-8)


@pytest.mark.parametrize("made", ["channels last", "transposed", "with gaps", "expanded"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
def test_any_order_in_memory(made: str, learned: bool) -> None:
    x, grad = torch.randn(2, 6, 4, 6), torch.randn(2, 6, 4, 6)
    x = {
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(1, 3).contiguous().transpose(1, 3),
        "with gaps": lambda: torch.cat([x, x], 1)[:, ::2],
        "expanded": lambda: x[:, :1].expand(2, 6, 4, 6),
    }[made]()
    ends = torch.tensor(-0.7), torch.tensor(1.9)
    ours, theirs = (
        run(kernel, x, *ends, (0, 255, False), grad, learned=learned, activation=Activation.RELU)
        for kernel in (gpu.fake_quantize, on_cpu)
    )
    assert_alike(ours, theirs, grad, codes=True)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
def test_half_precision_is_computed_with_in_float32(learned: bool) -> None:
    """The result is that of float32, rounded once. The interpreter cuts bfloat16 off, so this is float16."""
    x, grad = (tensor.half() for tensor in numbers((3, 50)))
    for grid in ("8 bits", "4 bits"):
        *settings, low, high = GRIDS[grid]
        ends = torch.tensor(low), torch.tensor(high)
        ours = run(gpu.fake_quantize, x, *ends, settings, grad, learned=learned)
        theirs = run(on_cpu, x.float(), *ends, settings, grad.float(), learned=learned)
        assert equal(ours.output, theirs.output.half())
        assert equal(ours.x, theirs.x.half())
        if ours.low is not None and theirs.low is not None:
            assert ours.low.dtype is torch.float32
            torch.testing.assert_close(ours.low, theirs.low, rtol=1e-3, atol=0.1)


def test_a_result_of_another_type() -> None:
    """As under autocast, which would round the weight to it next; the gradients are those of a cast behind it."""
    x, high = torch.randn(4, 30), torch.rand(4, 1) + 0.5
    grad = torch.randn(4, 30).half()
    for shape in ((4, 1), ()):
        end = high if shape else high.max()
        ours = run(
            gpu.fake_quantize, x, -end, end, (-128, 127, True), grad, learned=True, leaf=True, dtype=torch.float16
        )
        theirs = run(lambda *args: on_cpu(*args).half(), x, -end, end, (-128, 127, True), grad, learned=True, leaf=True)
        assert_alike(ours, theirs, grad.float(), codes=False)
        assert ours.x.dtype is torch.float32


def test_silu() -> None:
    x, grad = torch.randn(300), torch.randn(300)
    ends = torch.tensor(-0.28), torch.tensor(2.0)
    for learned in (True, False):
        ours = run(gpu.fake_quantize, x, *ends, (0, 255, False), grad, learned=learned, activation=Activation.SILU)
        theirs = run(
            lambda x, *args: on_cpu(torch.nn.functional.silu(x), *args), x, *ends, (0, 255, False), grad,
            learned=learned,
        )  # fmt: skip
        step = (ends[1] - ends[0]) / 255
        assert ((ours.output - theirs.output).abs() <= 1.01 * step).all()  # a last bit of the exponential can tip it
        assert (ours.output != theirs.output).float().mean() < 0.01
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-4, atol=1e-5)


def test_no_more_is_saved_than_needed() -> None:
    """A byte a number where the range learns, a bit where it does not."""
    sizes = []
    for learned in (True, False):
        kept: list[Tensor] = []
        low, high = (torch.tensor(end, requires_grad=learned) for end in (-1.0, 1.0))
        x = torch.randn(800, requires_grad=True) * 1

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gpu.fake_quantize(x, low, high, 0, 255, False, 1e-8, Activation.RELU)
        sizes.append(sum(tensor.nbytes for tensor in kept if tensor.dim()))
    assert sizes == [800, 100]


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(9, requires_grad=True)
    made = gpu.fake_quantize(x * 1, torch.tensor(-1.0), torch.tensor(1.0), 0, 255, False, 1e-8)
    with pytest.raises(RuntimeError, match=r"no second derivative.*LIGHTNING_QUANT_STOCK=1"):
        torch.autograd.grad(made.square().sum(), x, create_graph=True)


def test_kernels_that_do_not_compile_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles at the first launch: without a C compiler it is there and does not work."""

    class Broken:
        def forward(self, *_: object) -> None:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(gpu, "_kernels", Broken)
    assert gpu._reason() == "running them failed: RuntimeError: Failed to find C compiler."
    monkeypatch.undo()
    assert gpu._reason() is None


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lightning_quant.simulation.fast import triton_kernels as kernels

POINTERS = {"low_ptr": "*fp32", "high_ptr": "*fp32", "low_grad_ptr": "*fp32", "high_grad_ptr": "*fp32",
            "sums_ptr": "*fp32", "codes_ptr": "*i8", "bits_ptr": "*u8", "kept_ptr": "*u8"}
NUMBERS = {"qmin": "fp32", "qmax": "fp32", "smallest": "fp32"}

def made(kernel, number, **constants):
    types = {
        name: "constexpr" if name in constants else POINTERS.get(name) or NUMBERS.get(name)
        or (f"*{number}" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=places)
    return compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False}).asm["ptx"]

for number in ("fp32", "bf16", "fp16"):
    for kept in range(4):
        text = made(kernels.forward_kernel, number, SYMMETRIC=False, LEARNED=kept == 2, ACTIVATION=kept, KEPT=kept,
                    BLOCK=4096)
        assert "div.full" not in text and "div.approx" not in text, "divisions are to be exact"
    made(kernels.backward_bits_kernel, number, BLOCK=4096)
    made(kernels.backward_codes_kernel, number, SYMMETRIC=False, BLOCK=4096)
    made(kernels.finish_kernel, number, SYMMETRIC=False, BLOCK=1024)
    for learned in (True, False):
        made(kernels.backward_input_kernel, number, SYMMETRIC=True, LEARNED=learned, ACTIVATION=4, BLOCK=4096)
        made(kernels.forward_rows_kernel, number, SYMMETRIC=True, LEARNED=learned, BLOCK=1024)
        made(kernels.backward_rows_kernel, number, SYMMETRIC=True, LEARNED=learned, BLOCK=1024)
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu() -> None:
    """The interpreter takes more than the compiler, which needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr
