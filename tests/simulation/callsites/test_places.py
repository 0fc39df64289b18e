"""Where an operation stands is found by numbers of objects; what is kept and copied goes by what they stand for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.callsites.sites import sites_of
from lightning_quant.simulation.inplace import undone_on_error
from tests.helpers.networks import call

RECIPE = QuantRecipe(Precision.parse("w8a8"), calibration_samples=4)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Each(nn.Module):
    """Calls one function after another at one place."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x) - 0.25
        return x


class Parted(nn.Module):
    """Two operations that are decomposed, of which the first can be left out."""

    first = True

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(x) if self.first else x
        return F.silu(y - 0.25)


def answering(network: nn.Module, x: Tensor = X) -> list[str]:
    """The modules at call sites in the order in which they compute."""
    names = {id(child): name for name, child in network.named_children()}
    seen: list[str] = []
    handles = [
        child.register_forward_hook(lambda module, *_: seen.append(names[id(module)])) for child in network.children()
    ]
    network(x)
    for handle in handles:
        handle.remove()
    return seen


def quantized(network: nn.Module) -> Any:
    known = quantize(network, call(X[:1]), RECIPE)
    calibrate(known, [call(X)])
    return known.network


def test_a_function_in_python_and_one_in_c_are_counted_together() -> None:
    network = quantized(Each(torch.relu, F.relu, torch.relu))
    in_order = ["relu", "sub", "relu_1", "sub_1", "relu_2", "sub_2"]
    assert answering(network) == in_order
    network.functions = (F.relu, torch.relu, F.relu)  # the instructions at which they are called are others
    assert answering(network) == in_order


def test_functions_of_other_names_at_one_place_have_no_sites() -> None:
    network = quantized(Each(torch.relu))
    network.functions = (torch.tanh, torch.relu, torch.relu)
    assert answering(network) == ["sub", "relu"]


def test_parts_of_an_operation_belong_to_its_place() -> None:
    network = quantized(Parted())
    assert answering(network) == ["sigmoid", "mul", "sub", "sigmoid_1", "mul_1"]
    network.first = False
    assert answering(network) == ["sub", "sigmoid_1", "mul_1"]


def test_copies_find_their_own_sites() -> None:
    network = quantized(Parted())
    expected = answering(network)
    for other in (copy.deepcopy(network), copy.copy(network), pickle.loads(pickle.dumps(network))):
        assert answering(other) == expected
        assert sites_of(other).keys() == sites_of(network).keys()
    assert not hasattr(pickle.loads(pickle.dumps(sites_of(network))), "by_name")  # numbers are of one process
    vars(network)["_call_sites"] = dict(sites_of(network))  # as they were pickled once
    assert answering(network) == expected


def test_sites_of_a_failed_change_are_removed() -> None:
    network = quantized(Each(torch.relu))

    @undone_on_error(network)
    def change() -> None:
        sites = sites_of(network)
        relu, sub = sites
        sites[relu], sites[sub] = sites[sub], sites[relu]
        assert answering(network) == ["relu"]  # of two numbers: no difference of one
        raise KeyError

    assert answering(network) == ["relu", "sub"]
    with pytest.raises(KeyError):
        change()
    assert answering(network) == ["relu", "sub"]
