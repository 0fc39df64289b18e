"""Networks whose samples do not lie on the first axis: calibrated on samples, exported for one whole sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnx
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant import DeviceExport, PostTrainingQuantization, load_quantized
from lightning_quant.errors import CalibrationError

MakeTrainer = Callable[..., Trainer]
COUNT, TIME, FEATURES = 24, 6, 3


def frames() -> Tensor:
    return torch.randn(COUNT, TIME, FEATURES, generator=torch.Generator().manual_seed(0))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(FEATURES, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inward(x)).mean(0))


class Masked(TimeFirst):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.inward(x)
        return self.out(torch.matmul(torch.softmax(torch.matmul(x, x.transpose(1, 2)) + mask, dim=-1), x))


class Stated(TimeFirst):
    """Two layers' states as PyTorch's recurrent layers take them: (layers, batch, features)."""

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.out(torch.relu(self.inward(x)).mean(1) + states.sum(0))


class Steps(pl.LightningModule):
    """Calls its network as the test says."""

    def __init__(self, network: nn.Module, call: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.call = network, call

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.call(self.model, batch).square().mean(), batch_size=1)


def time_first(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch.transpose(0, 1))


def masked(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch, mask=torch.full((TIME, TIME), -30.0).triu(1))


def stated(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch, torch.zeros(2, len(batch), 8))


def as_collated(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch)


CASES: dict[str, tuple[type[nn.Module], Any, int, Any, list[list[int]]]] = {
    "time first": (TimeFirst, time_first, 4, None, [[TIME, 1, FEATURES]]),
    "time first, as long as the batch": (TimeFirst, time_first, TIME, None, [[TIME, 1, FEATURES]]),
    "time first from the loader": (TimeFirst, as_collated, TIME, pad_sequence, [[TIME, 1, FEATURES]]),
    "mask as long as the batch": (Masked, masked, TIME, None, [[1, TIME, FEATURES], [TIME, TIME]]),
    "as many layers as samples": (Stated, stated, 2, None, [[1, TIME, FEATURES], [2, 1, 8]]),
}


@pytest.mark.parametrize("name", CASES)
def test_exported_for_one_whole_sample(trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    network, call, batch_size, collate, wanted = CASES[name]
    data = DataLoader(frames(), batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]
    module = Steps(network(), call)
    export = DeviceExport(tmp_path, target="onnxruntime", report=False, samples=3, monitor="val_loss", name="net")
    quantization = PostTrainingQuantization("w8a16", calibration_dataloader=data, calibration_samples=10)
    one = trainer(quantization, export)
    one.validate(module, data, verbose=False)
    graph = onnx.load(export.bundle.qdq).graph
    assert [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input] == wanted
    assert export.bundle.manifest.parity.samples == 3
    assert export.bundle.manifest.parity.psnr_db > 80
    metric = export.reports[0].metric  # of the device's outputs, put together to batches again
    assert metric["device"] == pytest.approx(metric["simulation"], rel=1e-3)
    # ten samples, not ten time steps
    largest = float(frames()[:10].max())
    assert float(module.model.network.inward.input_quantizers[0].max) == pytest.approx(largest, rel=1e-3)
    # and a checkpoint knows it
    one.save_checkpoint(tmp_path / "net.ckpt")
    loaded: Any = load_quantized(Steps, tmp_path / "net.ckpt", network=network(), call=call)
    assert loaded.model.inputs.axes == module.model.inputs.axes
    other = DeviceExport(tmp_path, target=None, report=False, samples=3, name="again")
    trainer(PostTrainingQuantization("w8a16", calibration_dataloader=data), other).validate(loaded, data, verbose=False)
    assert other.bundle.manifest.parity.samples == 3


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from frames()


class Batches:
    """No data loader of PyTorch, and nothing to put other batches together with."""

    def __init__(self, size: int) -> None:
        self.batches = frames().split(size)

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize("given", ["stream", "own batches", "no loader"])
def test_other_kinds_of_data(trainer: MakeTrainer, given: str) -> None:
    """Where batches of other sizes cannot be made, the first sample alone must give the first answer."""
    kinds: dict[str, Any] = {
        "stream": DataLoader(Stream(), batch_size=4),
        "own batches": DataLoader(list(frames().split(4)), batch_size=None),  # type: ignore[arg-type]
        "no loader": Batches(4),
    }
    module = Steps(Masked(), masked)
    quantization = PostTrainingQuantization(calibration_dataloader=kinds[given], calibration_samples=10)
    trainer(quantization).validate(module, kinds[given], verbose=False)
    assert [tuple(tensor.shape) for tensor in module.model.inputs.tensors] == [(1, TIME, FEATURES), (TIME, TIME)]


@pytest.mark.parametrize(
    ("network", "call", "size"), [(TimeFirst, time_first, 4), (Masked, masked, TIME)], ids=["time first", "mask"]
)
def test_asks_where_nothing_shows_the_axis(trainer: MakeTrainer, network: Any, call: Any, size: int) -> None:
    data: Any = Batches(size)
    module = Steps(network(), call)
    with pytest.raises(CalibrationError, match=r"Cannot tell on which axis .* of 'model', of shapes .*collate_fn"):
        trainer(PostTrainingQuantization(calibration_dataloader=data)).validate(module, data, verbose=False)
    assert type(module.model) is network
