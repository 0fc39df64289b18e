"""Inputs of varying size, and in other forms than a tensor: calibrated with all, exported for one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnx
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

from lightning_quant import DeviceExport, PostTrainingQuantization
from lightning_quant.callbacks.calls import InputCatcher
from lightning_quant.callbacks.data import twin_batches

MakeTrainer = Callable[..., Trainer]


def images(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 8 + 2 * (i % 3), 8, generator=generator) for i in range(count)]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x)))


class Steps(pl.LightningModule):
    def __init__(self, network: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self.call = network, call

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        answer = self.call(self.model, batch)
        loss = sum(one.square().mean() for one in (answer if isinstance(answer, (list, tuple)) else [answer]))
        self.log("val_loss", loss, batch_size=1)


def shapes(export: DeviceExport) -> dict[str, list[int]]:
    assert export.bundle is not None
    inputs = onnx.load(export.bundle.qdq).graph.input
    return {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in inputs}


def run(trainer: MakeTrainer, folder: Path, module: pl.LightningModule, data: Any, **given: Any) -> DeviceExport:
    export = DeviceExport(folder, **{"target": None, "report": False, "samples": 4, "name": "net", **given})
    quantization = PostTrainingQuantization("w8a16", calibration_dataloader=data, calibration_samples=12)
    trainer(quantization, export).validate(module, data, verbose=False)
    assert export.bundle is not None
    return export


def test_images_of_varying_size(trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = images()
    data[5] *= 10  # of another size than the first
    module = Steps(Convolutions(), lambda network, batch: network(batch))
    with caplog.at_level(logging.INFO):
        loader = DataLoader(data, batch_size=1)  # type: ignore[arg-type]
        export = run(trainer, tmp_path, module, loader, target="onnxruntime", monitor="val_loss")
    assert shapes(export) == {"x": [1, 3, 8, 8]}
    assert export.bundle.manifest.parity.samples == 4
    assert "in 3 or more sizes: exported for [(1, 3, 8, 8)], and compared on those alone" in caplog.text
    assert len(export.reports[0].metric) == 3  # the device's too, on validation images of that size
    largest = max(float(image.max()) for image in data)
    assert float(module.model.network.first.input_quantizers[0].max) == pytest.approx(largest, rel=1e-3)


def test_calibrated_at_other_sizes_only(trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Steps(Convolutions(), lambda network, batch: network(batch))
    export = DeviceExport(tmp_path, target=None, report=False, samples=4, name="net")
    data = DataLoader([one for one in images() if one.shape[1] > 8], batch_size=1)  # type: ignore[arg-type]
    quantization = PostTrainingQuantization("w8a16", calibration_dataloader=data, calibration_samples=8)
    trainer(quantization, export).validate(module, DataLoader(images(1), batch_size=1), verbose=False)  # type: ignore[arg-type]
    assert shapes(export) == {"x": [1, 3, 10, 8]}
    assert export.bundle.manifest.parity.samples == 4


class OfLists(Convolutions):
    """Takes images as detectors do: a list of them, each of its own size."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return [super(OfLists, self).forward(image[None]) for image in x]


def test_lists_of_images(trainer: MakeTrainer, tmp_path: Path) -> None:
    data = DataLoader(images(), batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    module = Steps(OfLists(), lambda network, batch: network(batch))
    export = run(trainer, tmp_path, module, data)
    assert shapes(export) == {"x_0": [3, 8, 8]}
    assert export.bundle.manifest.parity.samples == 4
    largest = max(float(image.max()) for image in images())
    assert float(module.model.network.first.input_quantizers[0].max) == pytest.approx(largest, rel=1e-3)


class OfWords(nn.Module):
    """Integers, by keyword, with a scale without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor, scale: Tensor, *, offset: Tensor) -> Tensor:
        return self.out(self.embedding(words) * scale + offset)


def test_integers_keywords_and_numbers(trainer: MakeTrainer, tmp_path: Path) -> None:
    data = DataLoader(
        [{"words": torch.arange(6) + i % 4, "offset": torch.randn(6, 1)} for i in range(12)], batch_size=6
    )

    def call(network: nn.Module, batch: Any) -> Tensor:
        return network(batch["words"], torch.tensor(0.5), offset=batch["offset"])

    export = run(trainer, tmp_path, Steps(OfWords(), call), data)
    assert list(shapes(export).values()) == [[1, 6], [], [1, 6, 1]]
    assert export.bundle.manifest.parity.samples == 4


class OfSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 8)

    def forward(self, x: PackedSequence) -> Tensor:
        return self.layer(x)[1]


class Caught(pl.Callback):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        loader = trainer.validate_loop._data_source.dataloader()
        catcher = InputCatcher(trainer, pl_module, "model")
        catcher.learn_axes(twin_batches(loader))
        (self.call,) = catcher.catch(next(iter(loader)), 0)
        catcher.check_axes(self.call)


def test_packed_sequences(trainer: MakeTrainer) -> None:
    sequences = [torch.randn(2 + i % 3, 3) for i in range(12)]
    data = DataLoader(sequences, batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    caught = Caught()
    module = Steps(OfSequences(), lambda network, batch: network(pack_sequence(batch, enforce_sorted=False)))
    trainer(caught).validate(module, data, verbose=False)
    assert caught.call.batch_size == 4
    with torch.no_grad():
        whole = caught.call.call(module.model)
        for index in range(4):
            alone = caught.call.samples(index, index + 1).call(module.model)
            assert torch.allclose(alone[:, 0], whole[:, index], atol=1e-6)
