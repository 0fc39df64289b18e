"""From the float network to the simulation: the float one stays as it is, every rewriting is checked by numbers."""

from __future__ import annotations

import copy
import gc
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.errors import ConfigurationError, PreflightError
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation import aimet
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.callsites.attributes import ROUNDED_BY
from lightning_quant.simulation.callsites.rules.table import RULES
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.prepare import TOLERANCE, relative_difference
from tests.helpers.networks import (
    Body,
    Chain,
    Functional,
    Options,
    Sine,
    Untraceable,
    calibrated,
    call,
    images,
    quantized,
    seeded,
)

aimet.load()
from aimet_torch.common import quantsim  # noqa: E402
from aimet_torch.nn import QuantizationMixin  # noqa: E402
from aimet_torch.quantization.base import QuantizerBase  # noqa: E402


def bits(network: QuantizedNetwork) -> dict[str, int]:
    return {
        name: module.bitwidth for name, module in network.network.named_modules() if isinstance(module, QuantizerBase)
    }


def float_twin(network: QuantizedNetwork) -> nn.Module:
    """The quantized network with every quantizer taken out: what was rewritten, without rounding."""
    twin = copy.deepcopy(network)
    for module in twin.network.modules():
        vars(module).pop(ROUNDED_BY, None)
        for group in ("param_quantizers", "input_quantizers", "output_quantizers"):
            quantizers = getattr(module, group, None)
            if isinstance(quantizers, nn.ModuleDict):
                for name in quantizers:
                    quantizers[name] = None
            elif quantizers is not None:
                for index in range(len(quantizers)):
                    quantizers[index] = None
    return twin


class Noisy(Body):
    """Draws random numbers, even in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) + 0 * torch.rand(1)


@pytest.mark.parametrize("network", [Body, Options, Noisy, lambda: Untraceable(Body())])
@pytest.mark.parametrize("training", [False, True])
def test_the_float_network_is_not_changed(network: Any, training: bool) -> None:
    original = network().train(training)
    state = {name: value.clone() for name, value in original.state_dict().items()}
    modules = {name: (type(module), module.training) for name, module in original.named_modules()}
    calls: list[str] = []
    hooks = original.register_forward_hook(lambda *_: calls.append("hook"))
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    x = images().requires_grad_()
    made = quantized(original, call(x))
    assert {name: (type(module), module.training) for name, module in original.named_modules()} == modules
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())
    assert list(original._forward_hooks) == [hooks.id]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in original.modules() if m is not original)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert x.grad is None
    shared = {p.data_ptr() for p in original.parameters()} & {p.data_ptr() for p in made.parameters()}
    assert not shared
    assert made.training is training


def test_grad_mode_of_the_caller_is_kept_and_inference_mode_does_no_harm() -> None:
    with torch.no_grad():
        quantized(Body())
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        made = quantized(Body())
        assert torch.is_inference_mode_enabled()
    assert not any(tensor.is_inference() for tensor in [*made.parameters(), *made.buffers()])
    calibrate(made, [call(images(4))])
    made(images(2)).sum().backward()


def test_frozen_parts_stay_frozen() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).train()
    network[2].eval()
    network[0].weight.requires_grad_(False)
    made = quantized(network)
    module = made.network
    assert made.training
    assert module.get_submodule("4").training
    assert not module.get_submodule("2").training
    assert [module.get_submodule(name).weight.requires_grad for name in ("0", "4")] == [False, True]


@pytest.mark.parametrize("ignored", [False, True])
def test_global_state_of_aimet_is_restored(ignored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantizationMixin, "_ignore_unknown_modules", ignored)
    before = (
        QuantizationMixin._ignore_unknown_modules,
        dict(QuantizationMixin.cls_to_qcls),
        dict(aimet.map_torch_types_to_onnx),
        list(warnings.filters),
        quantsim.encoding_version,
    )
    quantized(nn.Sequential(nn.Conv2d(3, 3, 1), Sine(), nn.Conv2d(3, 3, 1)))
    quantized(Functional())
    quantized(nn.Sequential(nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)), call(torch.randn(2, 3, 4, 4, 4)))
    with pytest.raises(PreflightError):
        quantized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), strict=True)
    after = (
        QuantizationMixin._ignore_unknown_modules,
        dict(QuantizationMixin.cls_to_qcls),
        dict(aimet.map_torch_types_to_onnx),
        list(warnings.filters),
        quantsim.encoding_version,
    )
    assert before == after


def test_functional_operations_become_modules_with_quantizers() -> None:
    made = quantized(Functional())
    assert {"add", "relu", "interpolate"} <= {name for name, _ in made.network.named_modules()}
    assert "add.output_quantizers.0" in bits(made)
    assert isinstance(made.network, Functional)


def test_batch_norms_are_folded_into_the_same_function() -> None:
    original = Body()
    made = calibrated(original)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.network.modules())
    assert not torch.allclose(made.network.conv.weight, original.conv.weight)
    x = images(4)
    assert torch.allclose(float_twin(made)(x), original(x), atol=1e-5)


def test_a_wrong_fold_is_left_out_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = aimet.fold_all_batch_norms

    def wrong(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = real(model, *args, **kwargs)
        with torch.no_grad():
            model.network.conv.weight[0].mul_(1.05)
        return result

    monkeypatch.setattr(aimet, "fold_all_batch_norms", wrong)
    original = Body()
    made = calibrated(original)
    finding = next(one for one in made.findings if "folding batch norms changed the output" in one.problem)
    assert "left unfolded" in finding.problem
    assert isinstance(made.network.norm, nn.BatchNorm2d)
    assert torch.allclose(float_twin(made)(images(4)), original(images(4)), atol=1e-5)


class Chaotic(Body):
    """Repeats what moves apart numbers that are close: the logistic map (May 1976)."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(super().forward(x))
        for _ in range(18):
            x = 3.9 * x * (1 - x)
        return x


def test_a_fold_is_kept_in_a_network_that_any_other_rounding_moves_as_far(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calibrated(Chaotic())
    assert not made.findings
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.network.modules())
    moved = relative_difference(Chaotic()(images(4)), float_twin(made)(images(4)))
    assert moved > TOLERANCE, "the case shows nothing"
    test_a_wrong_fold_is_left_out_and_reported(monkeypatch)


class Clamped(nn.BatchNorm2d):
    """Computes more than a batch norm, which cannot be told apart from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


def test_a_norm_that_cannot_be_folded_costs_the_others_nothing() -> None:
    network = seeded(nn.Sequential(nn.Conv2d(3, 6, 3), Clamped(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))).eval()
    original = copy.deepcopy(network)
    made = calibrated(network)
    assert [type(one) for one in made.network.children()][3] is nn.Identity
    assert not [one for one in made.findings if "folding batch norms" in one.problem]
    x = images(4)
    assert torch.allclose(float_twin(made)(x), original(x), atol=1e-5)


@pytest.mark.parametrize("broken", ["raises", "nan"])
def test_a_fold_that_breaks_is_left_out_and_reported(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fold(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
        if broken == "raises":
            raise KeyError("no such operation")
        model.network.conv.weight.data[0] = float("nan")
        return []

    monkeypatch.setattr(aimet, "fold_all_batch_norms", fold)
    original = Body()
    made = calibrated(original)
    problem = next(finding.problem for finding in made.findings if "batch norms" in finding.problem)
    assert ("KeyError: 'no such operation'" in problem) if broken == "raises" else ("by inf" in problem)
    assert torch.allclose(float_twin(made)(images(4)), original(images(4)), atol=1e-5)


def test_a_network_that_computes_something_else_each_time_is_refused_and_left_as_it_was() -> None:
    calls: list[int] = []

    class Moody(Body):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.scores(x) * len(calls)

    original = Moody()
    state = {name: value.clone() for name, value in original.state_dict().items()}
    with pytest.raises(PreflightError, match="computes something else once its operations are quantized"):
        quantize(original, call(images()), QuantRecipe(Precision.parse("w8a8")))
    assert type(original) is Moody
    assert type(original.norm) is nn.BatchNorm2d
    assert original.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())


def test_a_rule_that_changes_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    add = RULES["add"]
    monkeypatch.setattr(add, "call", lambda module, args, kwargs: 1.1 * module(*args))
    with pytest.raises(PreflightError, match="computes something else"):
        calibrated(Body())


def test_control_flow_by_values_is_followed() -> None:
    original = Untraceable(Chain())
    made = calibrated(original)
    assert made.findings == []
    assert type(made.network.inner.first).__name__ == "QuantizedConv2d"
    x = images(4)
    assert torch.allclose(made(x), original(x), atol=0.1)
    assert not torch.equal(made(x), original(x))


def test_optional_arguments() -> None:
    x, mask = images(2), (images(2, 3, channels=1) > 0).float()
    without, given = calibrated(Options(), call(x)), calibrated(Options(), call(x, mask))
    assert without.findings == given.findings == []
    assert torch.allclose(float_twin(without)(x), Options()(x), atol=1e-5)
    assert torch.allclose(float_twin(given)(x, mask), Options()(x, mask), atol=1e-5)


def test_one_layer_alone() -> None:
    linear = seeded(nn.Linear(8, 4))
    made = calibrated(linear, call(torch.randn(6, 8)))
    assert made.findings == []
    parts = ("param_quantizers.weight", "input_quantizers.0", "output_quantizers.0")
    assert set(bits(made)) == {f"linear.{part}" for part in parts}
    assert isinstance(made.network, nn.Linear)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Linear": (nn.Linear(4, 6), (4, 4)),
    "Conv1d": (nn.Conv1d(4, 6, 3), (4, 4, 8)),
    "Conv2d": (nn.Conv2d(4, 6, 3), (4, 4, 8, 8)),
    "Conv3d": (nn.Conv3d(4, 6, 3), (4, 4, 5, 6, 7)),
    "Conv3d, depthwise": (nn.Conv3d(6, 6, 3, groups=6), (4, 6, 5, 6, 7)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 2, 2), (4, 4, 8)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 2, 2), (4, 4, 8, 8)),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 6, 2, 2), (4, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_have_a_scale_for_each_output(name: str) -> None:
    layer, shape = LAYERS[name]
    made = quantized(nn.Sequential(layer, nn.ReLU()), call(torch.randn(shape)))
    weight = made.network.get_submodule("0.param_quantizers.weight")
    assert isinstance(weight, aimet.QuantizerBase)
    assert weight.symmetric
    assert math.prod(weight.shape) == 6


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_weights_of_norms_have_all_integers_for_what_is_positive(dimensions: int) -> None:
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1](4, affine=True)
    assert norm.weight is not None
    norm.weight.data.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    made = calibrated(nn.Sequential(norm), call(torch.randn(4, 4, *[6] * dimensions)), precision="w4a8")
    weight = made.network.get_submodule("0.param_quantizers.weight")
    assert isinstance(weight, aimet.QuantizerBase)
    assert float(weight.get_scale().detach()) == pytest.approx(2 / 15)


NORMED: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "sequences": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (8, 4, 9)),
    "maps": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (8, 4, 6, 7)),
    "maps, transposed": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (8, 4, 6, 7)),
    "volumes": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (8, 4, 5, 6, 7)),
    "vectors": (nn.Linear(4, 6), nn.BatchNorm1d(6), (8, 4)),
    "maps, synchronized": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (8, 4, 6, 7)),
    "volumes, synchronized": (nn.Conv3d(4, 6, 3), nn.SyncBatchNorm(6), (8, 4, 5, 6, 7)),
    "vectors, synchronized": (nn.Linear(4, 6), nn.SyncBatchNorm(6), (8, 4)),
}


@pytest.mark.parametrize("name", NORMED)
def test_norms_behind_layers_of_every_kind_are_folded(name: str) -> None:
    layer, norm, shape = NORMED[name]
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    network = seeded(nn.Sequential(layer, norm, nn.ReLU())).eval()
    made = calibrated(network, call(samples), precision="w8a16")
    assert isinstance(made.network.get_submodule("1"), nn.Identity)
    assert made.findings == []
    assert relative_difference(network(samples), made(samples)) < 0.02


@pytest.mark.parametrize("precision", ["w8a8", "w8a16", "w4a8", "w4a16"])
def test_precision_of_the_whole_network(precision: str) -> None:
    made = quantized(Body(), precision=precision)
    weights, activations = made.recipe.precision.weight_bits, made.recipe.precision.activation_bits
    found = bits(made)
    assert len(found) >= 7
    assert all(width == (weights if "param" in name else activations) for name, width in found.items())


PLAIN = {
    "first.param_quantizers.weight": 8,
    "first.input_quantizers.0": 8,
    "relu.output_quantizers.0": 8,
    "second.param_quantizers.weight": 8,
    "second.output_quantizers.0": 8,
}


FINER = dict.fromkeys(("first.input_quantizers.0", "relu.output_quantizers.0", "second.output_quantizers.0"), 16)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({}, {}),
        ({"second": "w4a8"}, {"second.param_quantizers.weight": 4}),
        # what a layer computes with is its input: it becomes finer too, with all of the layer that makes it
        ({"second": "w8a16"}, FINER),
        ({"second": "w4a16"}, {"second.param_quantizers.weight": 4, **FINER}),
        ({"first": "w4a8"}, {"first.param_quantizers.weight": 4}),
        ({"*": "w4a16"}, {name: 4 if "param" in name else 16 for name in PLAIN}),
        # the last glob that matches wins
        ({"*": "w4a8", "sec*": "w8a8"}, {"first.param_quantizers.weight": 4}),
        ({"sec*": "w8a8", "*": "w4a8"}, {name: 4 for name in PLAIN if "param" in name}),
    ],
)
def test_overrides_change_the_matching_layers_only(overrides: dict[str, str], changed: dict[str, int]) -> None:
    assert bits(quantized(Chain(), overrides=overrides)) == {**PLAIN, **changed}


def test_override_reaches_every_weight_of_a_larger_network() -> None:
    everything = bits(quantized(Body(), overrides={"*": "w4a16"}))
    assert everything == bits(quantized(Body(), precision="w4a16"))
    some = bits(quantized(Body(), precision="w4a16", overrides={"b*": "w8a16"}))
    weights = {name: width for name, width in some.items() if "param" in name}
    assert weights == {
        "conv.param_quantizers.weight": 4,
        "branch.param_quantizers.weight": 8,
        "head.param_quantizers.weight": 4,
    }


@pytest.mark.parametrize("estimator", ["min_max", "tf_enhanced", "percentile"])
def test_overridden_layers_keep_the_range_estimator(estimator: str) -> None:
    def observers(network: QuantizedNetwork) -> dict[str, str]:
        modules = network.network.named_modules()
        return {name: type(m.encoding_analyzer).__name__ for name, m in modules if isinstance(m, QuantizerBase)}

    plain = observers(quantized(Chain(), range_estimator=estimator))
    assert observers(quantized(Chain(), range_estimator=estimator, overrides={"*": "w4a16"})) == plain
    expected = {"min_max": "MinMax", "tf_enhanced": "TfEnhanced", "percentile": "Percentile"}[estimator]
    assert plain["first.input_quantizers.0"].removeprefix("Fast") == f"{expected}EncodingAnalyzer"


def test_override_that_matches_nothing() -> None:
    with pytest.raises(ConfigurationError, match=r"'haed.*' matches no layer.*such as: .*first"):
        quantized(Chain(), overrides={"haed.*": "w8a16"})


def test_hardware_from_a_json_file(tmp_path: Path) -> None:
    from aimet_torch.common.quantsim_config import quantsim_config

    source = Path(quantsim_config.__file__).parent / "default_config_per_channel.json"
    mine = tmp_path / "mine.json"
    mine.write_text(source.read_text())
    assert bits(quantized(Chain(), hardware=str(mine))) == bits(quantized(Chain(), hardware="default"))
    mine.write_text("{}")
    with pytest.raises(PreflightError, match=r"AIMET cannot quantize .* with hardware config '.*mine\.json'"):
        quantized(Chain(), hardware=str(mine))


def test_network_that_cannot_run_raises_its_own_error() -> None:
    with pytest.raises(RuntimeError, match=r"expected input.*to have 3 channels"):
        quantized(Body(), call(images(channels=5)))


def test_network_without_any_tensor_in_its_output() -> None:
    class Silent(Body):
        def forward(self, x: Tensor) -> None:
            self.scores(x)

    with pytest.raises(PreflightError, match="Silent returned NoneType without any tensor"):
        quantized(Silent())


def test_relative_difference() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_difference({"x": a}, {"x": a}) == 0
    assert relative_difference(a, a + torch.tensor([0.0, 1.0])) == pytest.approx(0.25)
    assert relative_difference((a, a), (a, a * 1.1)) == pytest.approx(0.1)
    assert relative_difference(a, a[:1]) == float("inf")
    assert relative_difference(a, torch.tensor([1.0, float("nan")])) == float("inf")
    masked = torch.tensor([1.0, float("-inf")])
    assert relative_difference(masked, masked) == 0
    assert relative_difference(masked, masked * torch.tensor([2.0, 1.0])) == pytest.approx(1)
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(ValueError, match="zip"):
        relative_difference((a, a), (a,))


class _Resizing(nn.Module):
    """Nearest and bilinear, to the size of another tensor and by a factor; two of them into a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 4, 3, stride=stride, padding=1) for stride in (1, 2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two, three = self.one(x), self.two(x), self.three(x).relu()
        two = nn.functional.interpolate(two, size=one.shape[-2:], mode="nearest")
        three = nn.functional.interpolate(three, scale_factor=2.0, mode="bilinear")
        three = nn.functional.interpolate(three, size=one.shape[-2:], mode="bilinear")
        return torch.cat([one, two], 1).sum(1, keepdim=True) + three


def test_both_sides_of_a_resize_have_one_range() -> None:
    network = calibrated(_Resizing(), call(images(4)))
    modules = dict(network.network.named_modules())
    resizes = [module for module in modules.values() if type(module).__name__ == "QuantizedInterpolate"]
    assert len(resizes) == 3
    nearest, first, second = (resize.output_quantizers[0] for resize in resizes)
    assert modules["two"].output_quantizers[0] is nearest is modules["one"].output_quantizers[0]  # by the concatenation
    assert first is second  # of a resize of a resize
    # the tensor whose shape gives the size is none of a bilinear resize's business
    assert second is not modules["one"].output_quantizers[0]
    relu = next(module for module in modules.values() if type(module).__name__ == "QuantizedReLU")
    assert relu.output_quantizers[0] is second


def test_without_a_hardware_config_of_the_npu_ranges_are_not_tied() -> None:
    network = calibrated(_Resizing(), call(images(4)), hardware="default")
    modules = dict(network.network.named_modules())
    resize = [module for module in modules.values() if type(module).__name__ == "QuantizedInterpolate"][-1]
    relu = next(module for module in modules.values() if type(module).__name__ == "QuantizedReLU")
    assert relu.output_quantizers[0] is not resize.output_quantizers[0]


class Activated(nn.Module):
    """Two convolutions, the same activation behind each."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.second(self.activation(self.first(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), F.relu, F.relu6, lambda x: F.hardtanh(x, 0, 6), lambda x: x.clamp(0, 6), torch.relu_],
    ids=["ReLU", "ReLU6", "relu", "relu6", "hardtanh", "clamp", "relu_"],
)
def test_an_activation_that_the_hardware_computes_with_a_convolution_has_the_only_rounding(activation: Any) -> None:
    network = quantized(Activated(activation).eval(), call(images())).network
    convolutions: Any = (network.first, network.second)
    assert [layer.output_quantizers[0] for layer in convolutions] == [None, None]


class TwoImages(nn.Module):
    """An image that is used twice, before and behind a layer, and another that is only moved first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return self.second(self.first(image) + image) + self.second(other.flip(-1))


def test_the_ranges_of_inputs_do_not_learn_and_images_need_no_gradient() -> None:
    network = seeded(TwoImages())
    given = NetworkInputs((torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
    made = quantize(network, given, QuantRecipe("w8a8"))
    calibrate(made, [given])
    made.learn_ranges(True)
    made.train()
    needs_gradient = {}
    for name, module in made.network.named_modules():
        if hasattr(module, "input_quantizers"):
            for place, one in enumerate(module.input_quantizers):
                if one is not None:
                    one.register_forward_hook(
                        lambda _m, _i, out, key=(name, place): needs_gradient.update({key: out.requires_grad})
                    )
    made(*given.args).sum().backward()
    assert set(needs_gradient.values()) == {False}, needs_gradient
    assert made.network.first.output_quantizers[0].max.grad is not None
    assert made.network.first.param_quantizers["weight"].max.grad is not None
    made.learn_ranges(False)
    made.learn_ranges(True)
    assert not any(p.requires_grad for p in made.network.first.input_quantizers.parameters())


def test_no_weight_outlives_its_network() -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, Tensor) and one.shape == (7, 3, 5, 3) for one in gc.get_objects())

    def quantize_and_drop() -> None:
        calibrated(nn.Sequential(nn.Conv2d(3, 7, (5, 3)), nn.BatchNorm2d(7), nn.ReLU()).eval())

    quantize_and_drop()
    assert alive() == 0
