"""The quantized network stands in for the float one: same calls, same structures, a state dict that knows itself."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import FlatNetwork
from tests.helpers.networks import (
    Answer,
    AnyInputs,
    Body,
    DataclassOutput,
    DictInput,
    DictOutput,
    NamedOutput,
    Options,
    OrderedOutput,
    Pair,
    TupleOutput,
    TwoInputs,
    Untraceable,
    calibrated,
    call,
    images,
    quantized,
)


@pytest.mark.parametrize(
    ("network", "structure"),
    [
        (Body, Tensor),
        (DictOutput, dict),
        (OrderedOutput, OrderedDict),
        (TupleOutput, tuple),
        (NamedOutput, Pair),
        (DataclassOutput, Answer),
    ],
)
@pytest.mark.parametrize("traceable", [True, False])
def test_answers_in_the_same_structure_with_plain_tensors(network: Any, structure: type, traceable: bool) -> None:
    original = network() if traceable else Untraceable(network())
    made = calibrated(original)
    expected, actual = original(images(2)), made(images(2))
    assert type(actual) is type(expected) is structure
    outputs = tensors_in(actual)
    assert [type(tensor) for tensor in outputs] == [Tensor] * (1 if structure is Tensor else 2)
    for mine, theirs in zip(outputs, tensors_in(expected), strict=True):
        assert mine.shape == theirs.shape
        assert 0 < float((mine - theirs).detach().abs().max()) < 0.1 * float(theirs.detach().abs().max())
    if isinstance(actual, dict):
        assert list(actual) == ["logits", "doubled"]
    if isinstance(actual, Answer):
        assert actual.note == "kept"


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (TwoInputs, call(images(2), images(2, 1))),
        (TwoInputs, call(images(2), other=images(2, 1))),
        (TwoInputs, call(other=images(2, 1), image=images(2))),
        (AnyInputs, call(images(2), images(2, 1))),
        (DictInput, call({"image": images(2), "other": images(2, 1)})),
        (Options, call(images(2))),
        (Options, call(images(2), mask=None, scale=2.0)),
        (Options, call(images(2), mask=images(2, 3, channels=1), flag=False)),
    ],
)
def test_is_called_like_the_float_network(network: Any, inputs: NetworkInputs) -> None:
    original = network()
    made = calibrated(original, inputs)
    assert made.findings == []
    expected, actual = inputs.call(original), inputs.call(made)
    assert torch.allclose(actual, expected, atol=0.1 * float(expected.detach().abs().max()))
    assert not torch.equal(actual, expected)


def test_other_values_of_an_argument_are_computed_with() -> None:
    made, original = calibrated(Options(), call(images(2))), Options()
    for arguments in ({"scale": 3.0}, {"flag": False}, {"mask": images(2, channels=1).sigmoid()}):
        expected = original(images(2), **arguments)
        actual = made(images(2), **arguments)
        assert not torch.equal(actual, made(images(2)))
        assert (actual - expected).norm() < 0.2 * expected.norm(), arguments


def test_flat_network_takes_and_returns_tensors_only() -> None:
    inputs = call({"image": images(), "other": images(1, 1)})
    network = DictInput()
    (output,) = FlatNetwork(network, inputs)(images(), images(1, 1))
    assert torch.equal(output, inputs.call(network))
    assert [tensor.numel() for tensor in FlatNetwork(network, inputs)._structure.tensors] == [0, 0]


def test_other_sizes_and_batches_than_the_example() -> None:
    made = calibrated(Body())
    assert made(torch.randn(5, 3, 16, 24)).shape == (5, 4, 16, 24)


def test_attributes_of_the_network_inside() -> None:
    class Known(Body):
        def __init__(self) -> None:
            super().__init__()
            self.stride = 4

    made = quantized(Untraceable(Known()))
    assert made.inner.stride == 4
    assert made.inner.head is made.network.inner.head
    assert made.inner.conv.weight.shape == (6, 3, 3, 3)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        made.nothing  # noqa: B018
    assert not hasattr(made, "__no_protocol__")


def test_ranges_are_the_learnable_parameters_of_the_quantizers() -> None:
    made = calibrated(Body())
    mine = {id(parameter) for parameter in made.range_parameters()}
    assert mine == {id(parameter) for name, parameter in made.named_parameters() if "quantizers" in name}
    assert len(mine) > 8
    assert len(mine) == len(made.range_parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "build", [lambda: Body(), lambda: Untraceable(Body()), lambda: Options(), lambda: DictOutput()]
)
def test_copies_compute_the_same_and_are_independent(way: str, build: Any) -> None:
    made = calibrated(build())
    other = copy.deepcopy(made) if way == "deepcopy" else pickle.loads(pickle.dumps(made))
    assert type(other) is type(made)
    assert other.sim.model.network is other.network
    assert other.sim.onnx.sim is other.sim
    assert other.recipe == made.recipe
    assert other.calibrated
    x = images(3)
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(made(x)), tensors_in(other(x)), strict=True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not any(torch.equal(a, b) for a, b in zip(tensors_in(made(x)), tensors_in(other(x)), strict=True))
    assert made.sim.connected_graph is not None  # the original can do all it could
    # PyTorch: unpickling some traced networks makes every later tracing in the process fail
    assert quantized(Body()).findings == []


def test_a_deep_network_is_copied_within_the_recursion_limit() -> None:
    layers = [layer for _ in range(40) for layer in (nn.Conv2d(3, 3, 1), nn.ReLU())]
    made = calibrated(nn.Sequential(*layers))
    x = images(2)
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), made(x))


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_state_dict_survives_a_file_with_weights_only(precision: str) -> None:
    made = calibrated(Body(), precision=precision)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    manifest = state["_extra_state"]
    assert manifest["precision"] == precision
    assert manifest["calibrated"] is True
    other = quantized(Body(), precision=precision).eval()
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    assert not other.calibrated
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.calibrated
    assert torch.equal(other(images(3)), made(images(3)))


def test_state_dict_of_an_uncalibrated_network_stays_uncalibrated() -> None:
    other = calibrated(Body())
    other.load_state_dict(quantized(Body()).state_dict())
    assert not other.calibrated


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"precision": "w8a16"}, r"quantized with precision='w8a16'.*given precision='w8a8'"),
        ({"hardware": "htp_v73"}, r"quantized with hardware='htp_v73'.*given hardware='htp_v75'"),
        ({"overrides": {"head": "w8a16"}}, r"quantized with overrides=\{'head': 'w8a16'\}.*given overrides=\{\}"),
    ],
)
def test_manifest_that_disagrees_is_named_with_both_values(stored: dict[str, Any], message: str) -> None:
    foreign = calibrated(Body(), **stored).state_dict()
    made = quantized(Body())
    before = {name: value.clone() for name, value in made.network.state_dict().items() if isinstance(value, Tensor)}
    with pytest.raises(CheckpointError, match=message):
        made.load_state_dict(foreign)
    assert all(torch.equal(made.network.state_dict()[name], value) for name, value in before.items())


def test_float_weights_are_told_apart() -> None:
    class Module(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    made = Module(quantized(Body()).network)
    with pytest.raises(CheckpointError, match=r"holds float weights for 'model' \(e.g. 'model.conv.weight'\)"):
        made.load_state_dict(Module(Body()).state_dict())
    with pytest.raises(CheckpointError, match="holds float weights for 'the network'"):
        made.model.load_state_dict(Body().state_dict())


def test_manifest_says_what_the_network_is_called_with() -> None:
    manifest = quantized(Options(), call(images(2), mask=None)).manifest()
    assert manifest.inputs == {
        "args": [{"tensor": [2, 3, 8, 8], "dtype": "float32"}],
        "kwargs": {"mask": {"value": None}},
    }
    assert manifest.range_estimator == "min_max"
    assert manifest.calibrated is False
    made = NetworkInputs.from_description(manifest.inputs)
    assert quantized(Options(), made).state_dict().keys() == quantized(Options()).state_dict().keys()
