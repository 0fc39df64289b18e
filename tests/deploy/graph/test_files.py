"""What is written is the code that was quantized, for the size it is written for."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.deploy.export import export_bundle
from tests.helpers.networks import calibrated, call, images


class OtherWayInExport(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if torch.onnx.is_in_onnx_export():
            return F.interpolate(x, size=(2, 2), mode="area") * 2
        return F.adaptive_avg_pool2d(x, (2, 2))


class BySize(OtherWayInExport):
    """Padding that follows from the size, and a library's other way for sizes that are tensors."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if isinstance(height, Tensor):
            return self.conv(x) - 1
        missing = (-(-height // 5) * 5 - height, -(-width // 3) * 3 - x.size(-1))
        x = self.conv(F.pad(x, (0, missing[1], 0, missing[0])))
        mask = x.new_zeros(x.shape[1:])
        mask[:, x.numel() // len(x) // 80 :] = -1.0
        return x + mask


class OneLimit(nn.Module):
    """Distances of positions, as T5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        distances = (places[None] - places[:, None]).clamp(min=0).clamp(max=7)
        return self.linear(x) + self.bias(distances).mean(1)


@pytest.mark.parametrize("make", [OtherWayInExport, BySize, OneLimit], ids=lambda one: one.__name__)
def test_the_file_computes_what_the_simulation_does(tmp_path: Path, make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    inputs = call(torch.randn(4, 6, 4)) if make is OneLimit else call(images(4))
    known = calibrated(make(), inputs)
    bundle = export_bundle(known, tmp_path / "bundle", [inputs.first(1)])
    assert bundle.manifest.parity.psnr_db > 50
    for file in (bundle.qdq, bundle.aimet / "model.onnx"):
        operations = {node.op_type for node in onnx.load(file).graph.node}
        assert not operations & {"Shape", "ConstantOfShape", "ScatterND", "Range"}, operations


def test_other_code_sees_that_it_is_exported(tmp_path: Path) -> None:
    original = torch.onnx.is_in_onnx_export
    known = calibrated(OtherWayInExport(), call(images(4)))
    export_bundle(known, tmp_path / "bundle", [call(images(1))])
    assert torch.onnx.is_in_onnx_export is original
