"""Re-estimated batch norms equal those that PyTorch re-estimates in an unfolded network with rounded weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import ConfigurationError
from lightning_quant.ladder.rungs.bn_reestimation import BatchNormReestimation
from lightning_quant.ladder.rungs.cle import CrossLayerEqualization
from lightning_quant.simulation.precisions import quantized_layers
from lightning_quant.simulation.switched_off import unrounded, weights_only
from tests.callbacks.rung_cases import Chain, images, shrinking, trained
from tests.ladder.rungs.contexts import batches, context_of


class Normed(nn.Module):
    """Convolutions with batch norms of every kind: negative and zero weights, none at all, a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.relu = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.relu2(self.plain(self.depthwise(x)))
        return self.last(x).mean((2, 3))


def normed() -> Normed:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = Normed()
        nn.init.uniform_(network.norm.weight, 0.5, 2)
        nn.init.normal_(network.norm.bias)
        network.norm.weight[:3] *= -1
        network.norm.weight[3] = 0
        for _ in range(20):
            network.train()(images())
    return network.eval()


def integers(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round()


def by_pytorch(network: Normed, scales: dict[str, Tensor]) -> Normed:
    """The weights rounded channel by channel to 4 bits, the batch norms re-estimated batch by batch.

    Args:
        network: left as it is.
        scales: of the folded weights, by layer.
    """
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, norm in (("first", network.norm), ("depthwise", network.plain), ("last", None)):
            layer = network.get_submodule(name)
            # folded, a negative factor turns the grid from -8…7 to -7…8
            factor = torch.ones(len(layer.weight)) if norm is None else (norm.running_var + norm.eps).rsqrt()
            if norm is not None and norm.weight is not None:
                factor = factor * norm.weight
            factor = torch.where(factor == 0, 1.0, factor).view(-1, 1, 1, 1)
            scale = scales[name] / factor
            layer.weight.copy_((layer.weight / scale).round().clamp(-8, 7) * scale)
        for norm in (network.norm, network.plain):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for batch in batches():
            batch.call(network)
    return network.eval()


def test_it_equals_pytorch_in_an_unfolded_network() -> None:
    network = normed()
    quantized, context = context_of(network=network, precision="w4a16")
    layers = {name: quantized_layers(quantized)[name] for name in ("first", "depthwise", "last")}
    scales = {name: layer.param_quantizers["weight"].get_scale().clone() for name, layer in layers.items()}
    with torch.no_grad():
        BatchNormReestimation().apply(quantized, context)
        expected = by_pytorch(network, scales)(images())
        with weights_only(quantized):
            actual = quantized(images())
    error = (actual - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4
    now = {name: layer.param_quantizers["weight"].get_scale() for name, layer in layers.items()}
    assert [name for name in layers if not torch.equal(now[name], scales[name])] == ["first", "depthwise"]


def test_every_integer_stays_as_it_was() -> None:
    quantized, context = context_of(network=normed(), precision="w4a16")
    layers = quantized_layers(quantized)
    names = ["first", "depthwise", "last"]
    before = {n: integers(layers[n].weight, layers[n].param_quantizers["weight"].get_scale()) for n in names}
    with torch.no_grad():
        assert BatchNormReestimation().apply(quantized, context) == "re-estimated 2 folded batch norms"
    for name, expected in before.items():
        scale = layers[name].param_quantizers["weight"].get_scale()
        assert torch.equal(integers(layers[name].weight, scale), expected)


def test_it_restores_the_metric(tmp_path: Path) -> None:
    quantized, context = context_of(shrinking, precision="w4a16")
    before = context.measure()
    with torch.no_grad():
        changed = BatchNormReestimation().apply(quantized, context)
    assert changed == "re-estimated 1 folded batch norms"
    assert context.measure() > before + 2
    # the file computes the same: an export that differs raises
    bundle = export_bundle(quantized, tmp_path / "net", [call.first(1) for call in batches()])
    assert bundle.manifest.parity.psnr_db > 60


def test_after_equalization_the_channels_keep_their_new_scale() -> None:
    def uneven(network: Chain) -> None:
        shrinking(network)
        factors = torch.logspace(-1, 1, 16)
        network.norm.weight.mul_(factors)
        network.norm.bias.mul_(factors)
        network.second.weight.div_(factors.view(1, -1, 1, 1))

    quantized, context = context_of(uneven, precision="w4a16")
    with torch.no_grad():
        CrossLayerEqualization().apply(quantized, context)
        assert quantized.equalized
        before = context.measure()
        BatchNormReestimation().apply(quantized, context)
    assert context.measure() > before + 2
    with unrounded(quantized), torch.no_grad():
        quantized(images())  # nothing is left of the hooks


def test_the_float_reference_is_pytorchs_own_and_the_float_network_stays() -> None:
    network = normed()
    _, context = context_of(network=network, precision="w4a16")
    before = copy.deepcopy(context.float_network.state_dict())
    with torch.no_grad():
        reference = BatchNormReestimation().float_reference(context)
    assert reference is not None
    expected = copy.deepcopy(network)
    with torch.no_grad():
        for norm in (expected.norm, expected.plain):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for batch in batches():
            batch.call(expected)
    assert torch.equal(reference(images()), expected.eval()(images()))
    assert not reference.training
    assert all(torch.equal(value, before[name]) for name, value in context.float_network.state_dict().items())


def test_ranges_per_tensor_are_refused() -> None:
    quantized, _ = context_of(precision="w4a16", hardware="htp_v66")
    with pytest.raises(ConfigurationError, match="'first' has one range for all its channels"):
        BatchNormReestimation().check(quantized)


def test_a_network_without_batch_norms_is_skipped() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    quantized, context = context_of(network=network, precision="w4a16")
    reason = "no batch norm was folded into a layer with a range for each channel"
    assert BatchNormReestimation().skip_reason(quantized, context) == reason
    quantized, context = context_of(network=trained(), precision="w4a16")
    assert BatchNormReestimation().skip_reason(quantized, context) is None
