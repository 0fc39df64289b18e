"""Corrections of layers' outputs against PyTorch's own batch norms and plain means: equalized, uneven, interrupted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.ladder.rungs.bias_correction import BiasCorrection
from lightning_quant.ladder.rungs.bn_reestimation import BatchNormReestimation
from lightning_quant.ladder.rungs.cle import CrossLayerEqualization
from lightning_quant.ladder.rungs.layer_outputs import hooked
from lightning_quant.simulation.calibrate import calibrate_weights
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.switched_off import unrounded, weights_only
from tests.callbacks.rung_cases import halfway, images
from tests.helpers.small import assert_same_tensors
from tests.ladder.rungs.contexts import batches, context_of
from tests.ladder.rungs.test_bn_reestimation import normed


class Tokens(nn.Module):
    """Linear layers whose channels come last, behind two other axes; no batch norm but one behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 16)
        self.relu = nn.ReLU()
        self.mix = nn.Linear(16, 16)
        self.relu2 = nn.ReLU()
        self.first = nn.Linear(48, 12, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.mix(self.relu(self.embed(x.flatten(2)))))
        return self.head(self.relu3(self.norm(self.first(x.flatten(1)))))


def tokens() -> Tokens:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        network = Tokens()
        nn.init.uniform_(network.norm.weight, 0.5, 2)
        for _ in range(20):
            network.train()(images())
    return network.eval()


def apply(rung: Rung, network: QuantizedNetwork, context: RungContext) -> str:
    with torch.no_grad():
        return rung.apply(network, context)


def outputs(network: nn.Module, layers: dict[str, Any], calls: list[NetworkInputs]) -> dict[str, list[Tensor]]:
    """What layers output, call by call."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with torch.no_grad(), hooked(layers, lambda name, y: found[name].append(y.as_subclass(Tensor).clone())):
        for one in calls:
            one.call(network)
    return found


def by_pytorch(
    network: QuantizedNetwork, context: RungContext, scales: dict[str, Tensor], calls: list[NetworkInputs]
) -> nn.Module:
    """A copy of the network, its weights as the quantizers round them, a real batch norm behind each layer.

    The batch norms get what the layers would output unfolded, and re-estimate their statistics on ``calls``.

    Args:
        network: before the repair; left as it is.
        context: knows the batch norms that were folded.
        scales: by how much equalization made each channel of a layer's output larger.
        calls: the calibration data.
    """
    rounded = copy.deepcopy(context.prepared.network)
    for name, layer in quantized_layers(network).items():
        if "weight" in layer.param_quantizers:
            plain: Any = rounded.get_submodule(name)
            plain.weight.data = layer.param_quantizers["weight"](layer.weight).as_subclass(Tensor).detach()
            plain.bias.data = layer.bias.detach().clone()
    norms = {}
    for name, folded in context.prepared.batch_norms.items():
        norm = norms[name] = copy.deepcopy(folded)
        weight = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach()
        bias = torch.zeros(norm.num_features) if norm.bias is None else norm.bias.detach()
        factor = weight / (norm.running_var + norm.eps).sqrt() * scales[name]
        factor = torch.where(factor == 0, 1.0, factor)
        norm.weight, norm.bias = nn.Parameter(weight * scales[name]), nn.Parameter(bias * scales[name])
        norm.affine, norm.momentum = True, None
        norm.reset_running_stats()

        def behind(_: Any, __: Any, output: Tensor, norm: nn.Module = norm, factor: Tensor = factor) -> Tensor:
            return norm(output / (factor.view(1, -1, 1, 1) if output.dim() == 4 else factor))

        rounded.get_submodule(name).register_forward_hook(behind)
    with torch.no_grad():
        for norm in norms.values():
            norm.train()
        for one in calls:
            one.call(rounded)
        for norm in norms.values():
            norm.eval()
    return rounded


def assert_like_pytorch(network: QuantizedNetwork, reference: nn.Module, calls: list[NetworkInputs]) -> None:
    with torch.no_grad(), weights_only(network):
        for one in calls:
            expected = one.call(reference)
            assert float((one.call(network) - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("make", "samples", "equalize"),
    [
        (normed, 128, False),
        (normed, 100, False),  # a last batch of 4
        (normed, 33, False),  # of a single sample
        (normed, 100, True),
        (tokens, 100, False),
    ],
)
def test_batch_norms_are_those_of_pytorch(make: Callable[[], nn.Module], samples: int, equalize: bool) -> None:
    network, context = context_of(network=make(), precision="w4a16", calibration_samples=samples)
    before = {name: network.network.get_submodule(name).bias.clone() for name in context.prepared.batch_norms}
    if equalize:
        apply(CrossLayerEqualization(), network, context)
    # a layer's bias is multiplied by the scale of its outputs alone
    now = {name: network.network.get_submodule(name).bias.detach() for name in before}
    scales = {name: torch.where(old == 0, 1.0, now[name] / old) for name, old in before.items()}
    assert any(bool(((scale - 1).abs() > 0.1).any()) for scale in scales.values()) is equalize
    calls = [NetworkInputs((part,)) for part in images()[:samples].split(32)]
    context.samples = lambda: iter(calls)
    reference = by_pytorch(network, context, scales, calls)
    assert apply(BatchNormReestimation(), network, context) == f"re-estimated {len(scales)} folded batch norms"
    assert_like_pytorch(network, reference, calls)


@pytest.mark.parametrize("equalize", [False, True])
def test_weights_that_an_earlier_rung_shrank_are_compensated(equalize: bool) -> None:
    network, context = context_of(network=normed(), precision="w4a16")
    if equalize:
        apply(CrossLayerEqualization(), network, context)
    layer: Any = network.network.first
    wanted = torch.cat(outputs(network, {"first": layer}, batches())["first"]).std((0, 2, 3))
    with torch.no_grad():
        layer.weight.mul_(0.8)  # as a rung may do that chooses its own rounding
        calibrate_weights(network, ["first"])
    apply(BatchNormReestimation(), network, context)
    found = torch.cat(outputs(network, {"first": layer}, batches())["first"]).std((0, 2, 3))
    alive = wanted > 1e-6
    assert float((found / wanted)[alive].min()) > 0.9


def test_a_linear_layer_with_a_range_per_tensor_is_skipped() -> None:
    network, context = context_of(network=tokens(), precision="w4a16", hardware="htp_v66")
    BatchNormReestimation().check(network)  # there is no convolution
    assert BatchNormReestimation().skip_reason(network, context) is not None


def test_the_exported_file_computes_the_same_with_negative_and_zero_weights(tmp_path: Path) -> None:
    network, context = context_of(network=normed(), precision="w4a16")
    apply(CrossLayerEqualization(), network, context)
    apply(BatchNormReestimation(), network, context)
    bundle = export_bundle(network, tmp_path / "net", [one.first(4) for one in batches()])
    assert bundle.manifest.parity.psnr_db > 60


def test_biases_of_linear_layers_are_corrected_channel_by_channel() -> None:
    network, context = context_of(network=tokens(), precision="w4a16")
    known = quantized_layers(network)
    layers = {name: known[name] for name in ("embed", "mix", "first", "head")}

    def means() -> dict[str, Tensor]:
        found = outputs(network, layers, batches())
        return {name: torch.cat(values).flatten(0, -2).mean(0) for name, values in found.items()}

    with unrounded(network):
        wanted = means()
    with weights_only(network):
        shifted = means()
    assert apply(BiasCorrection(), network, context) == "corrected 4 biases"
    with weights_only(network):
        found = means()
    for name, expected in wanted.items():
        error = float((found[name] - expected).abs().max())
        assert error < 0.1 * float((shifted[name] - expected).abs().max())


def test_corrected_biases_restore_the_metric() -> None:
    network, context = context_of(halfway, precision="w4a16")
    before = context.measure()
    weights = {name: value.clone() for name, value in network.named_parameters() if name.endswith("weight")}
    apply(BiasCorrection(), network, context)
    assert context.measure() > before + 5
    assert all(torch.equal(network.get_parameter(name), value) for name, value in weights.items())


def test_without_a_bias_there_is_nothing_to_correct() -> None:
    network, context = context_of(network=nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()), precision="w4a16")
    assert BiasCorrection().skip_reason(network, context) == "no layer has a bias"


@pytest.mark.parametrize("rung", [BatchNormReestimation(), BiasCorrection()], ids=lambda one: one.name)
def test_calibration_data_that_fails_midway_leaves_the_network_as_it_was(rung: Rung) -> None:
    network, context = context_of(network=normed(), precision="w4a16")
    snapshot, answer = network.snapshot(), network(images())

    def samples() -> Iterator[NetworkInputs]:
        yield batches()[0]
        yield NetworkInputs((torch.zeros(1, 5, 8, 8),))

    context.samples = samples
    with pytest.raises(RuntimeError, match="channels"):
        apply(rung, network, context)
    assert_same_tensors(network.state_dict(), snapshot)
    assert torch.equal(network(images()), answer)  # quantizers are in their places
    assert not any(module._forward_hooks for module in network.network.modules())
