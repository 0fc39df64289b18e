"""What no device graph can hold is refused by name: random numbers, and outputs whose size depends on values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnx import TensorProto, helper
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.deploy.graph.fixed import check_fixed, check_repeatable, open_outputs, random_operations
from lightning_quant.errors import ExportError, ParityError
from tests.helpers.networks import calibrated, call, images, seeded


class Detector(nn.Module):
    """Scores of 16 places, and what is made of them."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
        self.end = End(end)
        seeded(self)

    def forward(self, x: Tensor) -> Any:
        return self.end(self.body(x).flatten(2).transpose(1, 2).reshape(-1, 5))


class End(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: Tensor) -> Any:
        return self.function(y)


def export(end: Callable[[Tensor], Any], path: Path) -> onnx.ModelProto:
    inputs = call(images(4))
    return onnx.load(export_bundle(calibrated(Detector(end).eval(), inputs), path / "net", [inputs]).qdq)


def boxes(y: Tensor) -> Tensor:
    return torch.cat([y[:, :2], y[:, :2] + y[:, 2:4].exp()], 1)


@pytest.mark.parametrize(
    ("end", "named"),
    [
        (lambda y: (y, y[y[:, 4].sigmoid() > 0.5]), "'output_1', by NonZero"),
        (lambda y: {"all": y, "kept": y[torchvision.ops.nms(boxes(y), y[:, 4], 0.5)]}, "'kept', by NonMaxSuppression"),
        (lambda y: torch.masked_select(y, y > 0), "'output', by NonZero"),
        (lambda y: (y > 0).nonzero(), "'output', by NonZero"),
        (lambda y: torch.unique((y * 3).int()), "'output', by Unique"),
        (lambda y: y[torch.arange((y[:, 4] > 0).sum())], "'output', by Range"),
        (lambda y: y[y[:, 4] > 0] * 2, "'output', by NonZero"),
    ],
)
def test_outputs_of_unknown_size(tmp_path: Path, end: Callable[[Tensor], Any], named: str) -> None:
    with pytest.raises(ExportError, match="depends on the values it computes") as caught:
        export(end, tmp_path)
    assert named in str(caught.value)
    assert "network='model.backbone'" in str(caught.value)
    assert not isinstance(caught.value, ParityError)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_python_took_from_values(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"returns 'output' of \[\d+, 5\].*its size depends on values"):
        export(lambda y: y[: max(int((y[:, 4] > 0).sum()), 1)], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "end",
    [
        lambda y: y[:, 4].topk(3)[0],
        lambda y: (y.argmax(1), torch.where(y > 0, y, torch.zeros(()))),
        lambda y: F.interpolate(y[None], size=y.shape[-1] * 2).flatten(1),
        lambda y: y[y[:, 4] > 0].sum(0),  # of one size whatever was found
    ],
)
def test_fixed_sizes_are_written_down(tmp_path: Path, end: Callable[[Tensor], Any]) -> None:
    for value in export(end, tmp_path).graph.output:
        assert all(axis.dim_value > 0 for axis in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize(
    ("end", "named"),
    [
        (lambda y: y + torch.randn_like(y), "randn_like in end"),
        (lambda y: y * torch.rand(1), "rand in end"),
        (lambda y: y * torch.bernoulli(torch.full_like(y, 0.5)), "bernoulli in end"),
        (lambda y: torch.multinomial(y.softmax(-1), 1), "multinomial in end"),
        (lambda y: F.gumbel_softmax(y), "exponential_ in end"),
        (lambda y: F.dropout(y, 0.5, True), "bernoulli_ in end"),
        (lambda y: torch.distributions.Normal(y, 1.0).sample(), "normal in end"),
        (lambda y: y[:, torch.randperm(5)], "randperm in end"),
    ],
)
def test_networks_that_sample(tmp_path: Path, end: Callable[[Tensor], Any], named: str) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(0)  # two draws may be rounded alike
    with pytest.raises(ExportError, match="draws random numbers in eval mode") as caught:
        export(end, tmp_path)
    assert named in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    torch.set_rng_state(state)


def test_what_is_drawn_and_thrown_away_is_not_sampling(tmp_path: Path) -> None:
    network = Detector(lambda y: y if float(torch.rand([])) < 2 else y * 0)
    given = call(images(1)).call(network)
    state = torch.get_rng_state()
    check_repeatable(network, call(images(1)), given, "Detector")
    assert torch.equal(torch.get_rng_state(), state)
    export(lambda y: y if float(torch.rand([])) < 2 else y * 0, tmp_path)


def model(*nodes: onnx.NodeProto, size: list[int | None] = [None]) -> onnx.ModelProto:  # noqa: B006
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "g",
        [value("x", TensorProto.FLOAT, [2, 3]), value("n", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, size)],
        [helper.make_tensor("zero", TensorProto.INT64, [1], [0])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_rules_on_graphs_made_by_hand() -> None:
    node = helper.make_node
    cut = node("Slice", ["x", "zero", "n", "zero"], ["y"], "/network/head/Slice")
    assert {name: cause.op_type for name, cause in open_outputs(model(cut, size=[None, 3])).items()} == {"y": "Slice"}
    # up to the size of something that is known, the size is known
    shape = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["end"])]
    known = model(*shape, node("Slice", ["x", "zero", "end", "zero"], ["y"]), size=[None, 3])
    assert open_outputs(known) == {}
    # and of something that is not, it is not
    found = [node("NonZero", ["x"], ["f"]), node("Shape", ["f"], ["s"]), node("Gather", ["s", "zero"], ["end"])]
    assert list(open_outputs(model(*found, node("Slice", ["x", "zero", "end", "zero"], ["y"]), size=[None, 3]))) == [
        "y"
    ]

    def branch(operation: str) -> onnx.GraphProto:
        inner = node(operation, ["x"], ["r"], "/network/inner/Random")
        return helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, [2, 3])])

    casts = [node("Cast", ["n"], ["b"], to=TensorProto.BOOL), node("Squeeze", ["b"], ["c"])]
    choice = node("If", ["c"], ["y"], then_branch=branch("RandomNormalLike"), else_branch=branch("Identity"))
    chosen = model(*casts, choice, size=[2, 3])
    assert [one.op_type for one in random_operations(chosen)] == ["RandomNormalLike"]
    with pytest.raises(ExportError, match="Net draws random numbers in eval mode: RandomNormalLike in inner"):
        check_fixed(chosen, "Net")
