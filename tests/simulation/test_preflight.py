"""What stays float, shared or unfolded is named, with a remedy; what is clean has no finding."""

from __future__ import annotations

import logging
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import PreflightError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation import preflight
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate, uncalibrated
from lightning_quant.simulation.preflight import Finding, FindingKind
from tests.helpers.networks import (
    Body,
    Chain,
    Functional,
    SharedConv,
    SharedReLU,
    Sine,
    Untraceable,
    calibrated,
    call,
    images,
    quantized,
)
from tests.helpers.qdq import psnr


def problems(network: nn.Module) -> dict[str, str]:
    """Problem by module."""
    found = quantized(network.eval()).findings
    assert len({finding.module for finding in found}) == len(found)
    return {finding.module: finding.problem for finding in found}


@pytest.mark.parametrize(
    "network",
    [
        SharedReLU(),
        SharedConv(),
        Chain(),
        Functional(),
        Untraceable(Functional()),
        nn.Sequential(nn.Conv2d(3, 3, 1), Sine(), nn.Identity()),
        nn.Sequential(spectral_norm(nn.Conv2d(3, 3, 1)), nn.ReLU()),
        nn.Sequential(orthogonal(nn.Conv2d(3, 3, 1)), nn.ReLU()),
    ],
    ids=[
        "one ReLU twice",
        "one convolution twice",
        "layers",
        "functions",
        "control flow by values",
        "unknown class",
        "spectral norm",
        "orthogonal",
    ],
)
def test_what_was_a_problem_once_is_none(network: nn.Module) -> None:
    assert problems(network) == {}


@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, images())])
def test_compiled_parts_are_refused(make: Any) -> None:
    part = make(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    with pytest.raises(PreflightError, match="1 of Sequential is compiled by TorchScript"):
        quantized(nn.Sequential(nn.Conv2d(3, 3, 1), part))


def test_a_batch_norm_that_is_left() -> None:
    found = problems(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()))
    assert found == {"1": "BatchNorm2d could not be folded into a convolution or linear layer"}
    (first,) = quantized(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))).findings
    assert first.module == "0"
    assert "could not be folded" in first.problem


class Spectrum(nn.Module):
    """Ends in operations that PyTorch's exporter does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return torch.fft.rfft2(x).abs().mean() + x


def test_what_onnx_does_not_have_is_named_before_calibration() -> None:
    (found,) = quantized(Spectrum().eval()).findings
    assert found.kind is FindingKind.NOT_IN_ONNX
    line = Spectrum.forward.__code__.co_firstlineno + 2
    assert found.problem == f"fft_rfft2 in test_preflight.py, line {line}, is not in ONNX: the export will fail"
    with pytest.raises(PreflightError, match="fft_rfft2"):
        quantized(Spectrum().eval(), strict=True)


class Unpooled(nn.Module):
    """SegNet in small: values go back to where the maxima were."""

    def __init__(self, unpool: Callable[..., torch.Tensor], **arguments: object) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.unpool, self.arguments = unpool, arguments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, places = F.max_pool2d(self.conv(x), 2, return_indices=True)
        made: torch.Tensor = self.last(self.unpool(y, places, **self.arguments))
        return made


@pytest.mark.parametrize(
    "make",
    [
        lambda: Unpooled(nn.MaxUnpool2d(2)),
        lambda: Unpooled(nn.MaxUnpool2d((2, 2), stride=2), output_size=(8, 9)),
        lambda: Unpooled(F.max_unpool2d, kernel_size=(2, 2), stride=(2, 2), padding=0),
    ],
)
def test_unpooling_is_quantized_and_said_not_to_be_in_onnx(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)  # a rounding may move a maximum to its neighbor, if they are that close
    network = make().eval()
    expected = network(images(1))
    simulation = calibrated(network, call(images(1)), precision="w8a16")
    (found,) = simulation.findings
    assert found.problem.startswith("max_unpool2d in ")
    assert psnr(expected.detach().numpy(), simulation(images(1)).detach().numpy()) > 30


class Masked(nn.Module):
    """Combines masks by an operator, one of them cast from whole numbers as attention masks are."""

    def __init__(self, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.combine = combine

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = self.combine(mask.to(torch.bool), x > 0)
        return self.linear(x).masked_fill(mask, 0.5)


@pytest.mark.parametrize("combine", [operator.and_, operator.or_, operator.xor])
def test_masks_are_combined_and_written(combine: Any, tmp_path: Path) -> None:
    network = Masked(combine).eval()
    inputs = call(torch.randn(2, 4), torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]))
    simulated = quantized(network, inputs, strict=True)
    calibrate(simulated, [inputs])
    assert uncalibrated(simulated) == []  # truth values have no range
    export_bundle(simulated, tmp_path / "masked", [inputs])  # which checks that the file computes the same


def test_whole_numbers_combined_bit_by_bit_are_named() -> None:
    network = Masked(lambda mask, _: (mask.long() & 1) > 0).eval()
    found = quantized(network, call(torch.randn(2, 4), torch.ones(2, 4, dtype=torch.long))).findings
    assert [finding.problem.split()[0] for finding in found] == ["__and__"]


class Pooled(nn.Module):
    """Pools maps of 6x6 to some size, as a layer or by a function."""

    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.conv(x))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(4),
        nn.AdaptiveMaxPool2d((None, 4)),
        lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
        lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveMaxPool2d((2, 6)),
        lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
    ],
)
def test_nothing_is_said_of_pooling_that_can_be_exported(pool: Any) -> None:
    assert not quantized(Pooled(pool).eval()).findings


def test_where_the_largest_of_unequal_windows_were_is_named_before_calibration() -> None:
    def pool(x: torch.Tensor) -> torch.Tensor:
        largest, places = F.adaptive_max_pool2d(x, (3, 4), return_indices=True)
        return largest * places

    (finding,) = quantized(Pooled(pool).eval()).findings
    assert finding.kind is FindingKind.NOT_IN_ONNX
    named = r"adaptive_max_pool2d in test_preflight\.py, line .* of 6x6 to 3x4"
    assert re.search(named, finding.problem), finding.problem
    with pytest.raises(PreflightError, match="where all windows have one size"):
        quantized(Pooled(pool).eval(), strict=True)


IN_ONNX = """
import torch
import torch.nn.functional as F
from torch import nn
from tests.helpers.networks import call, quantized

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        x = F.grid_sample(self.conv(x), torch.zeros(1, 4, 4, 2), align_corners=False)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x + torch.ones(4, 4).tril()

assert quantized(Network().eval(), call(torch.randn(1, 3, 8, 8))).findings == []
"""


@pytest.mark.slow
def test_what_later_versions_of_onnx_have_is_known_in_a_new_process() -> None:
    done = subprocess.run([sys.executable, "-c", IN_ONNX], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_parts_that_do_not_run_are_not_reported() -> None:
    class Unused(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Sequential(nn.BatchNorm2d(3), Sine())

    assert problems(Unused()) == {}


def test_nothing_changes_when_the_network_raises() -> None:
    network = Body()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    classes = [type(module) for module in network.modules()]
    with pytest.raises(PreflightError):
        quantize(network, call(images(channels=5)), QuantRecipe(Precision.parse("w8a8")))
    assert [type(module) for module in network.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_every_finding_says_of_what_kind_it_is() -> None:
    def kinds(network: nn.Module) -> list[FindingKind]:
        return [finding.kind for finding in quantized(network).findings]

    assert kinds(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))) == [FindingKind.UNFOLDED]
    assert kinds(Untraceable(SharedReLU())) == []
    assert [kind for kind in FindingKind if kind.leaves_open] == [FindingKind.LEFT_IN_FLOAT, FindingKind.NO_RANGES]


def test_table_is_aligned_and_strict_raises_with_it(caplog: pytest.LogCaptureFixture) -> None:
    left = FindingKind.LEFT_IN_FLOAT
    findings = [Finding("", "problem one", "do this", kind=left), Finding("body.relu", "two", "do that", kind=left)]
    assert preflight.table(findings) == (
        "module     problem      what to do\n(network)  problem one  do this\nbody.relu  two          do that"
    )
    network = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(PreflightError, match="strict=True") as caught:
        quantized(network, strict=True)
    with caplog.at_level(logging.WARNING, logger="lightning_quant"):
        findings = quantized(network).findings
    assert findings
    assert preflight.table(findings) in str(caught.value)
    assert preflight.table(findings) in caplog.text
    preflight.refuse([])


def test_siblings_that_share_parameters() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Body()
            self.head = self.model.head  # the very module
            self.tied = nn.Conv2d(6, 4, 1)
            self.tied.weight = self.model.head.weight  # another module, the same parameter
            self.other = nn.Conv2d(6, 4, 1)

    root = Module()
    found = preflight.sharing_siblings(root, root.model, "model")
    assert [finding.module for finding in found] == ["tied"]  # the very module is quantized where it is
    assert "'model'" in found[0].problem
    assert preflight.sharing_siblings(root, root.other, "other") == []
    wrapper = nn.ModuleDict({"outer": Body()})
    assert preflight.sharing_siblings(wrapper, wrapper["outer"].head, "outer.head") == []


def test_clean_networks_have_no_finding() -> None:
    torchvision = pytest.importorskip("torchvision")
    resnet = torchvision.models.resnet18()
    assert quantized(resnet, call(torch.randn(1, 3, 64, 64))).findings == []
    lraspp = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    made = quantized(lraspp, call(torch.randn(1, 3, 64, 64)), strict=True)
    assert made.findings == []
    # and that is true: every operation that computes has a quantizer after it
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in made.network.modules())
    unknown = [name for name, module in made.network.named_modules() if type(module) is nn.Conv2d]
    assert unknown == []
