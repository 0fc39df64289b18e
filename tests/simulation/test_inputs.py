"""Calls of a network: any structure, cut to fewer samples, described for a manifest and created from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in, with_tensors


@dataclass
class Batch:
    image: Tensor
    size: int = 3


class Point(NamedTuple):
    x: Tensor
    y: Tensor


def nested() -> Any:
    a, b, c, d, e = (torch.full((2, 3), float(i)) for i in range(5))
    return {"a": a, "rest": (b, [c, None, 3, "text"]), "batch": Batch(d), "point": Point(e, a)}


def test_tensors_of_any_structure_in_order() -> None:
    assert [float(tensor[0, 0]) for tensor in tensors_in(nested())] == [0, 1, 2, 3, 4, 0]
    assert tensors_in(None) == tensors_in(3) == tensors_in("x") == tensors_in({}) == []


def test_with_tensors_keeps_structure_and_plain_values() -> None:
    data = nested()
    doubled = with_tensors(data, [tensor * 2 for tensor in tensors_in(data)])
    assert [float(tensor[0, 0]) for tensor in tensors_in(doubled)] == [0, 2, 4, 6, 8, 0]
    assert doubled["rest"][1][1:] == [None, 3, "text"]
    assert isinstance(doubled["rest"], tuple)
    assert isinstance(doubled["batch"], Batch)
    assert doubled["batch"].size == 3
    assert isinstance(doubled["point"], Point)
    assert float(data["batch"].image[0, 0]) == 3  # the original is untouched


def test_calls_with_positional_and_keyword_arguments() -> None:
    class Recorder(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    inputs = NetworkInputs((torch.ones(2), 5), {"mask": None, "scale": torch.zeros(2)})
    args, kwargs = inputs.call(Recorder())
    assert args[1] == 5
    assert kwargs["mask"] is None
    assert [float(tensor[0]) for tensor in inputs.tensors] == [1, 0]


def test_first_cuts_batched_tensors_only() -> None:
    scalar, table = torch.tensor(7.0), torch.arange(5.0)
    inputs = NetworkInputs((scalar, torch.arange(8.0).reshape(4, 2)), {"labels": torch.arange(4), "table": table})
    assert inputs.batch_size == 4  # the scalar before it has no samples
    cut = inputs.first(3)
    assert cut.batch_size == 3
    assert torch.equal(cut.args[1], torch.arange(6.0).reshape(3, 2))
    assert torch.equal(cut.kwargs["labels"], torch.arange(3))
    assert torch.equal(cut.args[0], scalar)
    assert torch.equal(cut.kwargs["table"], table)
    assert inputs.first(9).batch_size == 4
    assert NetworkInputs((scalar,)).batch_size == NetworkInputs(("x",)).batch_size == 1


def test_description_survives_json() -> None:
    inputs = NetworkInputs(
        (torch.zeros(1, 3, 4, 5), (torch.zeros(2, dtype=torch.int64), [None, 3, 2.5, True, "text"])),
        {"batch": {"image": torch.zeros(1, 2, dtype=torch.bfloat16)}, "mask": None},
    )
    description = inputs.describe()
    made = NetworkInputs.from_description(json.loads(json.dumps(description)))
    assert made.describe() == description
    assert [(tensor.shape, tensor.dtype) for tensor in made.tensors] == [
        (tensor.shape, tensor.dtype) for tensor in inputs.tensors
    ]
    assert made.args[1][1] == [None, 3, 2.5, True, "text"]
    assert made.kwargs["mask"] is None
    # floats are spread out (a batch norm of zeros would prove nothing), integers are valid indices anywhere
    assert made.args[0].std() > 0.5
    assert made.args[1][0].abs().max() == 0


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int16", "int8", "uint8", "bool"])
def test_every_type_is_made_up(dtype: str) -> None:
    described = {"args": [{"tensor": [2, 3], "dtype": dtype}], "kwargs": {}}
    (tensor,) = NetworkInputs.from_description(described).args
    assert tensor.shape == (2, 3)
    assert tensor.dtype == getattr(torch, dtype)


def _tensor(shape: Any, dtype: Any = "float32") -> dict[str, Any]:
    return {"tensor": shape, "dtype": dtype}


@pytest.mark.parametrize(
    "item",
    [
        _tensor([2**20, 2**20]),
        _tensor([2**62, 2**62, 0]),
        _tensor([-1, 3]),
        _tensor([2], "complex64"),
        _tensor([2], "nn"),
        _tensor([2], ["float32"]),
        _tensor(["many"]),
        _tensor([float("inf")]),
        _tensor(7),
        {"tensor": [2]},
        {"dataclass": "tests.Batch"},
        {"object": "os.system"},
        {"dict": [1]},
        {},
        [],
        "tensor",
        None,
    ],
)
def test_hostile_description_is_refused(item: Any) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be created.*Pass example_inputs"):
        NetworkInputs.from_description({"args": [item], "kwargs": {}})


@pytest.mark.parametrize("description", [{}, {"args": []}, {"args": 3, "kwargs": {}}, {"args": [], "kwargs": []}, None])
def test_description_without_its_parts_is_refused(description: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be created"):
        NetworkInputs.from_description(description)


def test_many_tensors_cannot_ask_for_more_than_one_may() -> None:
    big = {"tensor": [2**18], "dtype": "bool"}
    with pytest.raises(CheckpointError, match="cannot be created"):
        NetworkInputs.from_description({"args": [{"list": [big] * 2**13}], "kwargs": {}})


def test_structures_that_cannot_be_made_up_say_so() -> None:
    description = NetworkInputs((Batch(torch.ones(2)),)).describe()
    with pytest.raises(CheckpointError, match=r"a dataclass of type .*Batch"):
        NetworkInputs.from_description(description)
