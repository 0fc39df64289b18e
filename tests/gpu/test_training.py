"""Quantized networks on a GPU: the numbers of the CPU, no wait in a step, the layout that was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet18

from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.compiled import Compiled
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import Body, calibrated, quantized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
NETWORKS = {
    "ffnet_nano": lambda: ffnet_nano(),
    "resnet18": lambda: resnet18(num_classes=5),
    "mobilenet_v3": lambda: mobilenet_v3_small(num_classes=5),
}


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def made(name: str, precision: str = "w8a8") -> QuantizedNetwork:
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    known = quantized(network, NetworkInputs((images(1),)), precision=precision).eval()
    calibrate(known, [NetworkInputs((images(),))])
    return known


def result(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output["out"]  # type: ignore[index]


@contextmanager
def exact() -> Iterator[None]:
    """Without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
def test_a_step_is_that_of_the_cpu(name: str, learned: bool) -> None:
    """Up to the order in which convolutions add up; a number on the border that falls the other way moves a step."""
    network = made(name)
    network.learn_ranges(learned)
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        one = copy.deepcopy(network.network).to(device)
        with exact():
            loss = result(one(images().to(device))).square().mean()
            loss.backward()
        losses.append(loss.item())
        gradients.append({key: p.grad.cpu() for key, p in one.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert gradients[0].keys() == gradients[1].keys()
    assert any(key.endswith(".min") for key in gradients[0]) is learned
    for key, gradient in gradients[0].items():
        if key.endswith("weight") and gradient.any():
            assert torch.nn.functional.cosine_similarity(gradient.flatten(), gradients[1][key].flatten(), dim=0) > 0.95


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_ranges_are_those_of_the_cpu(precision: str) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = quantized(ffnet_nano().eval(), NetworkInputs((images(1),)), precision=precision).eval()
        network.network.to(device)
        with exact():
            calibrate(network, [NetworkInputs((images().to(device),))])
        ends.append({key: p.detach().cpu() for key, p in network.named_parameters() if key.endswith((".min", ".max"))})
    for key, end in ends[0].items():
        torch.testing.assert_close(ends[1][key], end, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("estimator", ["tf_enhanced", "percentile"])
def test_histograms_are_those_of_the_cpu(estimator: str) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = quantized(ffnet_nano().eval(), NetworkInputs((images(1),)), range_estimator=estimator).eval()
        network.network.to(device)
        with exact():
            calibrate(network, [NetworkInputs((factor * images().to(device),)) for factor in (1, 0.5, 1.7)])
        ends.append({key: p.detach().cpu() for key, p in network.named_parameters() if key.endswith((".min", ".max"))})
    for key, end in ends[0].items():
        torch.testing.assert_close(ends[1][key], end, rtol=0.1, atol=1e-3)  # of candidates that are steps apart


class Arithmetic(nn.Module):
    """Numbers beside tensors, and a division whose divisor must not be rounded to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = (1 - x) * 0.5 + x
        return x / (x.square().mean(1, keepdim=True) + 1).sqrt()


def test_arithmetic_with_numbers_does_not_wait() -> None:
    torch.manual_seed(0)
    network = calibrated(Arithmetic(), NetworkInputs((images(),))).network.cuda()
    batch = images().cuda()
    network(batch).square().mean().backward()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(batch).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_layout_stays_and_nothing_waits(dtype: torch.dtype | None) -> None:
    network = made("resnet18").network.to("cuda").to(memory_format=torch.channels_last)
    batch = images().cuda().to(memory_format=torch.channels_last)
    layouts = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    optimizer = torch.optim.SGD(network.parameters(), 1e-4)

    def step() -> None:
        with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            loss = network(batch).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert layouts
    assert all(layouts)


def test_a_run_is_repeated_bit_for_bit() -> None:
    states = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # resize's gradient has atomics of PyTorch's own
    try:
        network = made("resnet18")
        for _ in range(2):
            one = copy.deepcopy(network.network).cuda()
            optimizer = torch.optim.Adam(one.parameters(), 1e-3)
            for _ in range(5):
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = one(images().cuda()).float().square().mean()
                loss.backward()
                optimizer.step()
            states.append({key: p.detach().cpu() for key, p in one.named_parameters()})
    finally:
        torch.use_deterministic_algorithms(before)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_nan_stays_nan() -> None:
    network = made("resnet18").network.cuda()
    batch = images().cuda()
    batch[0, 0, 0, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype is not torch.float32):
            assert network(batch)[0].isnan().all()


def test_a_step_is_captured_in_a_graph() -> None:
    """Nothing in a step reads the host; what a graph computes is what the step did."""
    network = made("resnet18").network.cuda()
    batch = images().cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        for _ in range(3):
            network.zero_grad(set_to_none=True)
            network(batch).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    expected = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
    graph = torch.cuda.CUDAGraph()
    network.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        network(batch).square().mean().backward()
    graph.replay()
    torch.cuda.synchronize()
    for key, gradient in expected.items():
        got = network.get_parameter(key).grad
        assert got is not None
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-5)


def test_short_training_agrees_with_the_cpu() -> None:
    """QAT of ffnet_nano on a fixed task: the loss falls alike."""
    network = made("ffnet_nano")
    batch = images(8)
    targets = (batch.mean(1) > 0).long()
    ends = []
    for device in ("cpu", "cuda"):
        one = copy.deepcopy(network.network).to(device)
        optimizer = torch.optim.Adam((p for p in one.parameters() if p.requires_grad), 1e-3)
        given, wanted = batch.to(device), targets.to(device)
        losses = []
        with exact():
            for _ in range(30):
                optimizer.zero_grad()
                scores = nn.functional.interpolate(result(one(given)), wanted.shape[-2:], mode="bilinear")
                loss = nn.functional.cross_entropy(scores, wanted)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        ends.append(losses)
    assert ends[1][0] == pytest.approx(ends[0][0], rel=0.02)
    assert ends[0][-1] < 0.9 * ends[0][0]
    assert ends[1][-1] == pytest.approx(ends[0][-1], rel=0.1)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "graphs"])
def test_compiled_it_computes_the_same(options: dict[str, str]) -> None:
    """In one graph, in CUDA graphs too, step after step. A number on the border may fall the other way."""
    torch.manual_seed(0)
    network = calibrated(Body(), NetworkInputs((images(),))).network.cuda().train()
    network = network.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(network)
    batch = images().cuda().to(memory_format=torch.channels_last)
    compiled = Compiled(network, options)
    optimizers = [torch.optim.SGD(one.parameters(), 1e-4) for one in (network, twin)]
    with compiled.active():
        for _ in range(4):
            losses, gradients = [], []
            for one, optimizer in zip((network, twin), optimizers, strict=True):
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = one(batch).float().square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                gradients.append({key: p.grad.clone() for key, p in one.named_parameters() if p.grad is not None})
            assert compiled.why_not is None
            assert losses[0] == pytest.approx(losses[1], rel=2e-2)
            assert gradients[0].keys() == gradients[1].keys()
            for key, gradient in gradients[1].items():
                if key.endswith("weight"):
                    assert (
                        nn.functional.cosine_similarity(gradient.flatten(), gradients[0][key].flatten(), dim=0) > 0.98
                    )
        network.eval()
        twin.eval()
        with torch.no_grad():
            step = (network(batch) - twin(batch)).abs().max() / twin(batch).abs().max()
    assert step < 0.05
