"""The batch axes of any structure, from what two and three times the same sample make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_quant.errors import CheckpointError
from lightning_quant.simulation.batch_axes import NoBatchAxisError, find_axes, fit
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in


@dataclass
class Pair:
    image: Tensor
    mask: Tensor


class Named(NamedTuple):
    frames: Tensor
    table: Tensor


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def packed(count: int) -> PackedSequence:
    lengths = torch.arange(count, 0, -1).clamp_max(5)
    return pack_padded_sequence(numbers(count, 5, 3), lengths, batch_first=True)


STRUCTURES: dict[str, Callable[[int], Any]] = {
    "first": lambda n: numbers(n, 3),
    "time first": lambda n: numbers(6, n, 3),
    "last": lambda n: numbers(3, 2, n),
    "mask as long as the batch": lambda n: (numbers(n, 4, 3), numbers(4, 4)),
    "recurrent": lambda n: (numbers(n, 5, 3), (numbers(4, n, 8), numbers(4, n, 8))),
    "dict": lambda n: {"image": numbers(n, 3), "size": 7, "extra": [numbers(2, n), None, "text"]},
    "list of images": lambda n: ([numbers(3, 4, 4 + i % 2) for i in range(n)], numbers(4, 4)),
    "tiles": lambda n: numbers(9 * n, 3, 4, 4),
    "tiles with labels": lambda n: (numbers(2 * n, 3), numbers(n, 1)),
    "dataclass": lambda n: Pair(numbers(n, 3), numbers(4, 4)),
    "named tuple": lambda n: Named(numbers(6, n), numbers(4)),
    "zero-dimensional": lambda n: (torch.tensor(3.0), numbers(n, 3)),
    "integers": lambda n: torch.arange(5 * n).reshape(5, n),
    "packed": packed,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_samples_of_a_batch_of_four(name: str) -> None:
    make = STRUCTURES[name]
    inputs = NetworkInputs((make(4),), axes=find_axes(((make(2),), {}), ((make(3),), {})))
    tiles = 9 if name == "tiles" else 1
    assert inputs.batch_size == 4 * tiles
    assert inputs.first(3).batch_size == 3
    whole = inputs.first(100)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, inputs.tensors, strict=True))
    one = inputs.samples(2, 3)
    assert one.batch_size == 1
    assert type(one.args[0]) is type(inputs.args[0])
    # each tensor is cut along one axis, to the samples asked for
    if name not in ("packed", "list of images"):
        for part, tensor in zip(tensors_in(one.args), tensors_in(inputs.args), strict=True):
            changed = [i for i in range(tensor.dim()) if part.shape[i] != tensor.shape[i]]
            assert len(changed) <= 1
            for axis in changed:
                each = part.shape[axis]
                assert torch.equal(part, tensor.narrow(axis, 2 * each, each))
                assert each * 4 * tiles == tensor.shape[axis]


def test_samples_of_packed_sequences_stay_whole() -> None:
    axes = find_axes(((packed(2),), {}), ((packed(3),), {}))
    one = NetworkInputs((packed(4),), axes=axes).samples(1, 2).args[0]
    frames, lengths = pad_packed_sequence(packed(4), batch_first=True)
    assert lengths.tolist() == [4, 3, 2, 1]
    assert torch.equal(pad_packed_sequence(one, batch_first=True)[0][0], frames[1, :3])


def test_images_of_a_list_stay_whole() -> None:
    make = STRUCTURES["list of images"]
    inputs = NetworkInputs(make(4), axes=find_axes((make(2), {}), (make(3), {})))
    one = inputs.samples(1, 2)
    assert [tuple(tensor.shape) for tensor in one.tensors] == [(3, 4, 5), (4, 4)]
    described = json.loads(json.dumps(inputs.describe()))
    assert described["args"][0]["batch"] == 1
    assert NetworkInputs.from_description(described).first(2).batch_size == 2


@pytest.mark.parametrize(
    ("two", "three"),
    [
        (numbers(2, 2), numbers(3, 3)),  # similarities of all with all
        (numbers(2, 5), numbers(3, 6)),
        (numbers(5, 4), numbers(6, 4)),
        (numbers(4, 4), numbers(4, 4)),
        ([numbers(4)] * 3, [numbers(4)] * 4),
        (numbers(2, 4), [numbers(4)]),
    ],
)
def test_calls_that_do_not_tell(two: Any, three: Any) -> None:
    with pytest.raises(NoBatchAxisError):
        find_axes(two, three)


def test_axes_of_a_call_with_a_state_hold_for_one_without() -> None:
    state = STRUCTURES["recurrent"]
    axes = find_axes(state(2), state(3))
    assert fit(state(5), axes)
    assert fit((numbers(5, 5, 3), None), axes)
    assert not fit((numbers(5, 3), None), axes)
    assert not fit(state(5)[0], axes)
    call = NetworkInputs((numbers(4, 5, 3), None)).batched_like(NetworkInputs(state(2), axes=(axes, {})))
    assert call.axes == (axes, {})
    assert call.first(3).batch_size == 3


@pytest.mark.parametrize("name", ["time first", "recurrent", "dict", "mask as long as the batch"])
def test_axes_survive_the_manifest(name: str) -> None:
    make = STRUCTURES[name]
    axes = find_axes(((make(2),), {}), ((make(3),), {}))
    inputs = NetworkInputs((make(1),), axes=axes)
    made = NetworkInputs.from_description(json.loads(json.dumps(inputs.describe())))
    assert made.axes == axes
    assert made.describe() == inputs.describe()


@pytest.mark.parametrize("batch", [[2, 1], [-1, 1], [0, 0], [0, "1"], [True, 1], [0], 7, "0", [0, 3]])
def test_hostile_axes_are_refused(batch: Any) -> None:
    item = {"tensor": [2, 3], "dtype": "float32", "batch": batch}
    with pytest.raises(CheckpointError, match="cannot be created"):
        NetworkInputs.from_description({"args": [item], "kwargs": {}})
    with pytest.raises(CheckpointError, match="cannot be created"):
        NetworkInputs.from_description({"args": [{"list": [], "batch": 0}], "kwargs": {}})
