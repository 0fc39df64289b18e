"""No tensor reaches the device without a range, unless there is a reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.audit import Explanation, Reason, unexplained
from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import ExportError
from lightning_quant.simulation import aimet
from lightning_quant.simulation.preflight import Finding, FindingKind
from tests.helpers.networks import (
    Body,
    Chain,
    Functional,
    SharedReLU,
    Sine,
    Untraceable,
    attention_free_transformer,
    calibrated,
    call,
    images,
    seeded,
)

aimet.load()
from aimet_torch.nn.modules import custom  # noqa: E402


def reasons(network: nn.Module, path: Path, *inputs: Tensor) -> dict[str, str]:
    """What the bundle says of the tensors without an encoding."""
    example = call(*inputs) if inputs else call(images(4))
    made = calibrated(network, example)
    bundle = export_bundle(made, path / "net", [example])
    found = bundle.manifest.without_encoding
    # nothing is left that is neither encoded nor explained, seen from the files alone
    model = onnx.load(bundle.aimet / "model.onnx")
    encodings = json.loads((bundle.aimet / "model.encodings").read_text())
    encoded = {e["name"] for part in ("activation_encodings", "param_encodings") for e in encodings[part]}
    consumed = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    integers = {
        value.name
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT
    }
    constants = {i.name for i in model.graph.initializer if i.data_type != onnx.TensorProto.FLOAT}
    assert consumed - encoded - set(found) - integers - constants - {""} == set()
    return found


def test_every_float_tensor_of_a_clean_network_has_a_reason(tmp_path: Path) -> None:
    bias = "bias: a 32-bit integer on the device, its scale that of the input times that of the weight"
    assert reasons(Chain(), tmp_path) == {
        "network.first.bias": bias,
        "network.second.bias": bias,
        "/network/first/Conv_output_0": "computed together with the Relu after it",
    }


@pytest.mark.parametrize(
    ("module", "tensors"),
    [
        # the convolution before it was computed together with it
        ("relu.relu", ["/network/conv/Conv_output_0", "/network/relu/relu/Relu_output_0"]),
        ("head", ["output"]),
        ("branch", ["/network/branch/Conv_output_0"]),
    ],
)
def test_a_removed_output_quantizer_fails_the_export(tmp_path: Path, module: str, tensors: list[str]) -> None:
    made = calibrated(Body())
    made.network.get_submodule(module).output_quantizers[0] = None
    with pytest.raises(ExportError, match=rf"{len(tensors)} tensors .* no encoding, e\.g\. {', '.join(tensors)}:"):
        export_bundle(made, tmp_path / "net", [call(images())])
    assert list(tmp_path.iterdir()) == []


def test_a_removed_weight_quantizer_fails_the_export(tmp_path: Path) -> None:
    network = calibrated(Chain(), call(images(4)))
    network.network.first.param_quantizers["weight"] = None
    with pytest.raises(ExportError, match=r"network\.first\.weight"):
        export_bundle(network, tmp_path / "net", [call(images(4))])


def test_a_removed_input_quantizer_fails_the_export(tmp_path: Path) -> None:
    made = calibrated(Body())
    made.network.conv.input_quantizers[0] = None
    with pytest.raises(ExportError, match=r"no encoding, e\.g\. x:"):
        export_bundle(made, tmp_path / "net", [call(images())])


def test_a_removed_quantizer_is_seen_beside_functional_operations(tmp_path: Path) -> None:
    network = nn.Sequential(Chain(), Untraceable(Functional()))
    made = calibrated(seeded_channels(network))
    export_bundle(made, tmp_path / "net", [call(images())])
    made.network.get_submodule("0.relu").output_quantizers[0] = None
    with pytest.raises(ExportError, match=r"2 tensors .*0/relu/Relu_output_0"):
        export_bundle(made, tmp_path / "net", [call(images())])


def seeded_channels(network: nn.Sequential) -> nn.Sequential:
    network[0].second = nn.Conv2d(4, 3, 1)  # three channels for the second part
    return network


def test_gelu_and_layer_norm_are_one_operation_each(tmp_path: Path) -> None:
    found = reasons(attention_free_transformer(), tmp_path, torch.randn(6, 5, 8))
    inside = [
        reason for name, reason in found.items() if name.startswith("/network/network.1/") and "Constant" not in name
    ]
    assert inside
    assert set(inside) == {"inside one operation of the simulation (1)"}
    assert found["network.2.bias"].startswith("bias")
    assert found["/network/network.0/MatMul_output_0"] == "computed together with the bias after it"


def test_a_layer_alone(tmp_path: Path) -> None:
    linear = seeded(nn.Linear(8, 4))
    assert list(reasons(linear, tmp_path / "gemm", torch.randn(6, 8))) == ["network.linear.bias"]
    # of more than two dimensions, ONNX makes two operations
    found = reasons(linear, tmp_path / "matmul", torch.randn(6, 5, 8))
    assert found["network.linear.bias"].startswith("bias")
    assert found["/network/linear/MatMul_output_0"] == "computed together with the bias after it"


def test_outputs_of_a_layer_that_nobody_uses(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.lstm(x)[0])

    reasons(Recurrent(), tmp_path, torch.randn(2, 5, 8))


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(3, 3, 1), Sine(), nn.Conv2d(3, 3, 1)),
        Untraceable(SharedReLU()),
        Untraceable(Functional()),
    ],
    ids=["function", "module called twice", "functions behind control flow"],
)
def test_nothing_is_left_in_float(tmp_path: Path, network: nn.Module) -> None:
    assert not any(reason.startswith("left in float") for reason in reasons(network, tmp_path).values())


def _model(*nodes: onnx.NodeProto, initializers: tuple[str, ...] = ()) -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        list(nodes),
        "g",
        [value("x", onnx.TensorProto.FLOAT, [1, 2])],
        [value("y", onnx.TensorProto.FLOAT, [1, 2])],
        [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [2], [1.0, 2.0]) for name in initializers],
    )
    return onnx.helper.make_model(graph)


def test_rules_on_hand_made_graphs() -> None:
    node = onnx.helper.make_node
    plain = _model(node("Add", ["x", "c"], ["a"]), node("Mul", ["a", "c"], ["y"]), initializers=("c",))
    explained, missing = unexplained(plain, [])
    assert missing == ["c", "x", "a", "y"]  # where it meets an activation, a float constant makes the operation float
    assert explained == {}
    assert unexplained(plain, ["x", "a", "y", "c"]) == ({}, [])
    # an activation explains what it is fused with only if its own output has a range
    fused = _model(node("Add", ["x", "x"], ["a"]), node("Relu", ["a"], ["y"]))
    assert unexplained(fused, ["x", "y"]) == ({"a": Explanation(Reason.FUSED, "Relu")}, [])
    assert unexplained(fused, ["x"])[1] == ["a", "y"]
    # integers need no range
    shape = _model(node("Shape", ["x"], ["s"]), node("Reshape", ["x", "s"], ["y"]))
    assert unexplained(shape, ["x", "y"]) == ({}, [])
    # a constant of a shape that follows from the input's is one all the same, and a single number needs no range
    counted = _model(
        node("Shape", ["x"], ["s"]),
        node("Expand", ["c", "s"], ["e"]),
        node("ReduceSum", ["c"], ["one"], keepdims=0),
        node("Add", ["x", "e"], ["a"]),
        node("Mul", ["one", "a"], ["y"]),
        initializers=("c",),
    )
    assert unexplained(counted, ["x", "a", "y"])[1] == ["e"]
    # what ONNX makes of one operation of the simulation is its own business
    parts = [
        node("Sigmoid", ["x"], ["a"], "/network/norm/Sigmoid"),
        node("Mul", ["a", "c"], ["y"], "/network/norm/Mul"),
    ]
    assert unexplained(_model(*parts, initializers=("c",)), ["x", "y"])[1] == []
    parts[1].name = "/network/mul/Mul"
    assert unexplained(_model(*parts, initializers=("c",)), ["x", "y"])[1] == ["c", "a"]


@pytest.mark.parametrize("operation", ["Add", "Concat", "Div", "Max", "Mul", "Sub", "Where"])
@pytest.mark.parametrize("place", [0, 1])
def test_every_operator_that_takes_a_constant_as_it_takes_an_activation(operation: str, place: int) -> None:
    node = onnx.helper.make_node
    operands = ["x", "c"] if place else ["c", "x"]
    attributes = {"axis": 0} if operation == "Concat" else {}
    nodes = [node(operation, [*["cond"] * (operation == "Where"), *operands], ["y"], **attributes)]
    if operation == "Where":
        nodes.insert(0, node("Cast", ["x"], ["cond"], to=onnx.TensorProto.BOOL))
    model = _model(*nodes, initializers=("c",))
    assert unexplained(model, ["x", "y"])[1] == ["c"]
    assert unexplained(model, ["x", "y", "c"])[1] == []
    left = Finding("", "", "", kind=FindingKind.LEFT_IN_FLOAT)
    explained, missing = unexplained(model, ["x", "y"], [left])
    assert (explained, missing) == ({"c": Explanation(Reason.LEFT_IN_FLOAT, "the network")}, [])
    assert str(explained["c"]) == "left in float, as the preflight said of the network"


def test_only_kinds_of_findings_count_not_their_words() -> None:
    node = onnx.helper.make_node
    model = _model(node("Sin", ["x"], ["a"], "/network/wave/Sin"), node("Relu", ["a"], ["y"], "/network/relu/Relu"))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1, 2]))
    encoded = ["x"]
    for kind in FindingKind:
        finding = Finding("wave", "left in float, it has no ranges", "", kind=kind)
        quiet = Finding("wave", "", "", kind=kind)
        expected = ["y"] if kind in (FindingKind.LEFT_IN_FLOAT, FindingKind.NO_RANGES) else ["a", "y"]
        assert unexplained(model, encoded, [finding])[1] == unexplained(model, encoded, [quiet])[1] == expected


class Positioned(nn.Module):
    """A parameter that meets an activation."""

    def __init__(self, operation: nn.Module, size: tuple[int, ...] = (1, 4, 8, 8)) -> None:
        super().__init__()
        self.conv, self.operation = nn.Conv2d(3, 4, 3, padding=1), operation
        seeded(self)
        self.position = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.conv(x), self.position)


@pytest.mark.parametrize("operation", [custom.Add(), custom.Subtract(), custom.Multiply()], ids=str)
def test_a_parameter_beside_an_activation_needs_a_range(tmp_path: Path, operation: nn.Module) -> None:
    """Without one the NPU computes the operation in float, and no host computation shows it."""
    made = calibrated(Positioned(operation), call(images(1)))
    (operator,) = [module for module in made.network.modules() if isinstance(module, type(operation))]
    operator.input_quantizers[1] = None
    with pytest.raises(ExportError, match=r"1 tensors .*e\.g\. network\.position"):
        export_bundle(made, tmp_path / "net", [call(images(1))])
    assert list(tmp_path.iterdir()) == []
    operator.input_quantizers[1] = copy.deepcopy(operator.output_quantizers[0])
    bundle = export_bundle(made, tmp_path / "net", [call(images(1))])
    assert "network.position" not in bundle.manifest.without_encoding


def test_a_single_number_needs_no_range(tmp_path: Path) -> None:
    found = reasons(Positioned(custom.Add(), (1,)), tmp_path)
    assert "network.position" not in found  # it is on a grid of its own, exactly


def test_constants_inside_one_operation_need_none(tmp_path: Path) -> None:
    """How ONNX writes a GELU is not the user's concern."""
    found = reasons(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)), tmp_path)
    assert any(reason.startswith("inside one operation of the simulation") for reason in found.values())
