"""Which parts of a network are learned together, and what is seen of them while the network runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.ladder.rungs.blocks import find_blocks, inputs_of, learnable_layers, passed_through, pieces
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class Looked(nn.Module):
    """Computes with what the network around it wrote down."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) + self.seen.pop()


class Recalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Looked()

    def forward(self, x: Tensor) -> Tensor:
        self.inner.seen.append(x)
        return self.inner(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.shared(torch.relu(self.first(x)))))


class Mixed(nn.Module):
    """Blocks in a list and in a sequence, out of order, with a layer of its own and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.stages = nn.Sequential(Residual(), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), Residual())

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        for block in reversed(self.blocks):
            x = block(x=x)
        return {"scores": self.head(self.stages(x).mean((2, 3)) * scale)}


def maps(samples: int = 4) -> Tensor:
    return torch.randn(samples, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(network: nn.Module, *more: Tensor) -> tuple[QuantizedNetwork, NetworkInputs]:
    call = NetworkInputs((maps(), *more))
    made = quantize(network.eval(), call.first(1), QuantRecipe(precision="w4a8", calibration_samples=4)).eval()
    calibrate(made, [call])
    return made, call


def found(network: nn.Module, *more: Tensor, most: int = 6) -> list[tuple[str, int]]:
    made, call = quantized(network, *more)
    blocks = find_blocks(made.network, learnable_layers(made), [call], most)
    return [(block.name, len(block.layers)) for block in blocks]


def test_classes_are_blocks_and_containers_are_opened_in_the_order_of_the_pass() -> None:
    scale = torch.ones(4, 4)
    expected = [("blocks.1", 2), ("blocks.0", 2), ("stages.0", 2), ("stages.1", 1), ("stages.3", 2), ("head", 1)]
    assert found(Mixed(), scale) == expected
    assert found(Mixed(), scale, most=20) == [("", 10)]  # small enough to be one itself
    assert [name for name, _ in found(Mixed(), scale, most=1)][:3] == ["blocks.1.a", "blocks.1.b", "blocks.0.a"]


def test_what_computes_from_more_than_its_arguments_is_learned_around_or_layer_by_layer() -> None:
    assert found(Recalled()) == [("", 2)]
    assert found(nn.Sequential(Recalled(), Residual()), most=2) == [("0", 2), ("1", 2)]

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.more = Looked(), nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(5)])

        def forward(self, x: Tensor) -> Tensor:
            self.inner.seen.append(x)
            return self.more(self.inner(x))

    assert found(Outside())[:3] == [("inner.a", 1), ("inner.b", 1), ("more.0", 1)]


def test_layers_that_are_called_twice_are_in_none() -> None:
    assert found(Twice()) == [("", 1)]


def test_what_a_block_is_given_is_what_the_network_gives_it() -> None:
    network, call = quantized(Mixed(), torch.full((4, 4), 2.0))
    module = network.network.get_submodule("stages.3")
    given, wanted = passed_through(network.network, module, call)
    assert torch.equal(inputs_of(network.network, module, call).tensors[0], given.tensors[0])
    with torch.no_grad():
        assert torch.equal(given.call(module), wanted[0])
        whole = call.call(network.network)["scores"]
        head = network.network.get_submodule("head")
        assert torch.equal(passed_through(network.network, head, call)[1][0], whole)
        given, wanted = passed_through(network.network, network.network.get_submodule("blocks.1"), call)
        assert list(given.kwargs) == ["x"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.network.modules())


def test_a_network_that_catches_everything_is_left_all_the_same() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.a(x)
            except Exception:
                x = x * 0
            return self.b(x)

    network, call = quantized(Careful())
    given = inputs_of(network.network, network.network.get_submodule("a"), call)
    assert torch.equal(given.tensors[0], call.tensors[0])


def test_what_is_changed_in_place_later_is_kept_as_it_was() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), Residual()

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x.mul_(2)
            return self.b(x).add_(1)

    network, call = quantized(InPlace())
    module = network.network.get_submodule("b")
    given, wanted = passed_through(network.network, module, call)
    with torch.no_grad():
        assert torch.equal(given.call(module), wanted[0])


@pytest.mark.parametrize(("samples", "sizes"), [(3, [3, 1]), (8, [4]), (1, [1, 1, 1, 1])])
def test_pieces(samples: int, sizes: list[int]) -> None:
    call: Any = NetworkInputs((maps(4),))
    cut = list(pieces([call], samples))
    assert [piece.batch_size for piece in cut] == sizes
    assert torch.equal(torch.cat([piece.args[0] for piece in cut]), call.args[0])
