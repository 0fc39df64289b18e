"""What the device named in DeviceExport does not compute in integers, reported before calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.errors import PreflightError
from lightning_quant.simulation.preflight import FindingKind
from tests.helpers.small import SmallModule, small_data, small_loader

MakeTrainer = Callable[..., Trainer]


class Masked(nn.Module):
    """A network with an operation that older chips refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x)
        maps = maps.masked_fill(maps > 0.5, 0.0)
        return self.last(F.adaptive_avg_pool2d(maps, 1).flatten(1))


class Calibrating(Exception):
    pass


def unused_data() -> DataLoader[Any]:
    """Calibration data that nobody may come to."""

    class Raising(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            raise Calibrating

    return Raising(small_data(), batch_size=8)


def messages(trainer: MakeTrainer, tmp_path: Path, device: str, network: nn.Module, **recipe: Any) -> list[str]:
    """The warnings until calibration begins."""
    callback = lq.PostTrainingQuantization(calibration_dataloader=unused_data(), **recipe)
    export = lq.DeviceExport(tmp_path, target="htp_emulator", device=device)
    module = SmallModule(network)
    one = trainer(callback, export)
    with pytest.warns() as caught, pytest.raises(Calibrating):
        one.validate(module, small_loader(), verbose=False)
    kinds = {finding.kind for finding in module.quantized.findings}
    texts = [str(one.message) for one in caught if "by the NPU of" in str(one.message)]
    assert kinds == ({FindingKind.REFUSED} if texts else set())
    return texts


def test_the_warning_comes_before_calibration_and_names_module_and_operation(
    trainer: MakeTrainer, tmp_path: Path
) -> None:
    (text,) = messages(trainer, tmp_path, "Samsung Galaxy S21", Masked())
    assert "Not all of 'model' is computed in integers by the NPU of Samsung Galaxy S21" in text
    assert "masked_fill  MaskedFill by a computed mask is refused by the NPU's compiler (Hexagon v68, w8a8)" in text


@pytest.mark.parametrize("device", ["Samsung Galaxy S24", "SM8750"])
def test_devices_that_take_everything_are_silent(trainer: MakeTrainer, tmp_path: Path, device: str) -> None:
    assert messages(trainer, tmp_path, device, Masked()) == []


def test_a_network_of_npu_operators_is_silent_on_every_device(trainer: MakeTrainer, tmp_path: Path) -> None:
    assert messages(trainer, tmp_path, "Samsung Galaxy S21", nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())) == []


def test_strict_makes_it_an_error(trainer: MakeTrainer, tmp_path: Path) -> None:
    callback = lq.PostTrainingQuantization(calibration_dataloader=unused_data(), strict=True)
    export = lq.DeviceExport(tmp_path, target="htp_emulator", device="SM8350")
    with pytest.raises(PreflightError, match="MaskedFill by a computed mask is refused"):
        trainer(callback, export).validate(SmallModule(Masked()), small_loader(), verbose=False)
