"""What is divided by stays above zero once it is rounded, and roots keep a finite slope."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from lightning_quant.simulation.callsites.safe_division import SafeDivide
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.networks import calibrated, call


class Divided(nn.Module):
    """Each row divided by a number of its own, which is tiny compared to others: less than a step of 8 bits."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.scale = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.scale.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(x)
        if self.way == "length":
            return x / (x.norm(dim=-1, keepdim=True) + 1e-6)
        if self.way == "normalize":
            return nn.functional.normalize(x, dim=-1)
        if self.way == "inverse root":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x / (x.abs().sum(-1, keepdim=True) + 1e-6)


ROWS = torch.tensor([[1.0, 2.0, -3.0, 4.0], [1e-3, 2e-3, 1e-3, -1e-3], [0.5, -0.5, 0.25, 1.0]])


@pytest.mark.parametrize("way", ["length", "normalize", "inverse root", "sum"])
def test_it_trains_and_its_file_computes_the_same(tmp_path: Path, way: str) -> None:
    known = calibrated(Divided(way), call(ROWS))
    network = known.network
    assert any(isinstance(module, SafeDivide) for module in network.modules())
    network.train()
    output = network(ROWS)
    assert output.isfinite().all()
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in network.parameters())
    bundle = export_bundle(known, tmp_path / "bundle", [call(ROWS)])
    assert bundle.manifest.parity.psnr_db > 60


def test_a_divisor_of_either_sign_is_unchanged() -> None:
    class Signed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x + 10.0).sub(9.0)

    known = calibrated(Signed(), call(torch.linspace(-3, 3, 32).reshape(8, 4)))
    (division,) = (module for module in known.network.modules() if isinstance(module, SafeDivide))
    y = torch.tensor([[-2.0, -1.0, 1.0, 2.0]])
    rounded = division.input_quantizers[1](y)
    assert rounded.min() < -1.9
    assert (division(torch.ones(1, 4), y) < 0).any()


def test_a_divisor_of_another_precision_has_one_grid() -> None:
    known = calibrated(Divided("sum"), call(ROWS), overrides={"add": "w8a16", "div": "w8a16"})
    (division,) = (module for module in known.network.modules() if isinstance(module, SafeDivide))
    (before,) = known.network.get_submodule("add").output_quantizers
    assert division.input_quantizers[1] is before


def test_the_length_of_zero_has_a_zero_gradient() -> None:
    known = calibrated(Divided("length"), call(ROWS))
    x = torch.zeros(1, 4, requires_grad=True)
    known.network(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_copies() -> None:
    import copy
    import pickle

    known = calibrated(Divided("length"), call(ROWS))
    for other in (copy.deepcopy(known.network), pickle.loads(pickle.dumps(known.network))):
        assert torch.equal(other(ROWS), known.network(ROWS))
        assert QuantizedNetwork.of(other) is not None
