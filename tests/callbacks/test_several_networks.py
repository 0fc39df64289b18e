"""Several networks of one module, each quantized by a callback of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from lightning_quant import (
    DeviceExport,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    load_quantized,
)
from lightning_quant.callbacks.quantization import quantized_networks
from lightning_quant.errors import ConfigurationError
from tests.helpers.small import assert_same_tensors, small_loader

MakeTrainer = Callable[..., Trainer]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.conv(images)).mean((2, 3))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.relu, self.outer = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, features: Tensor) -> Tensor:
        return self.outer(self.relu(self.inner(features)))


class Coder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.parts = Encoder(), nn.ModuleDict({"decoder": Decoder()})

    def forward(self, images: Tensor) -> Tensor:
        return self.parts["decoder"](self.encoder(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        assert len(list(self.parameters())) == 6  # no ranges
        groups = [{"params": self.encoder.parameters(), "lr": 0.01}, {"params": self.parts.parameters(), "lr": 0.1}]
        optimizer = SGD(groups, momentum=0.9, weight_decay=0.1)
        schedule = OneCycleLR(optimizer, [0.02, 0.2], total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def both(callback: Any, order: int = 1, **arguments: Any) -> list[Any]:
    return [callback(network=name, **arguments) for name in ("encoder", "parts.decoder")[::order]]


@pytest.mark.parametrize("order", [1, -1])
def test_calibrated_one_after_the_other(trainer: MakeTrainer, order: int) -> None:
    module = Coder()
    trainer(*both(PostTrainingQuantization, order, calibration_dataloader=small_loader())).validate(
        module, small_loader(), verbose=False
    )
    networks = quantized_networks(module)
    assert networks.keys() == {"encoder", "parts.decoder"}
    assert all(network.calibrated for network in networks.values())
    images = next(iter(small_loader()))[0]
    plain = Coder().eval()
    with torch.no_grad():
        assert float((module.eval()(images) - plain(images)).abs().max()) < 0.1 * float(plain(images).abs().max())
        assert not torch.equal(module(images), plain(images))


@pytest.mark.parametrize("order", [1, -1])
def test_trained_together(trainer: MakeTrainer, tmp_path: Path, order: int) -> None:
    def fit(epochs: int, **arguments: Any) -> tuple[Trainer, Coder]:
        one = trainer(*both(QuantizationAwareTraining, order), max_epochs=epochs)
        module = Coder()
        one.fit(module, small_loader(), small_loader(), **arguments)
        return one, module

    one, module = fit(2)
    groups = one.optimizers[0].param_groups
    assert len(groups) == 4
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in groups[2:]:
        inside = {names[id(parameter)].partition(".")[0] for parameter in group["params"]}
        given = groups[0] if inside == {"encoder"} else groups[1]
        assert inside in ({"encoder"}, {"parts"})
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (given["lr"], given["momentum"], 0.0)
    assert len(one.lr_scheduler_configs[0].scheduler.get_last_lr()) == 2
    first, _ = fit(1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    _, resumed = fit(2, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert_same_tensors(resumed.state_dict(), module.state_dict())
    one.save_checkpoint(tmp_path / "two.ckpt")
    assert_same_tensors(load_quantized(Coder, tmp_path / "two.ckpt").state_dict(), module.state_dict())


@pytest.mark.parametrize("callback", [PostTrainingQuantization, QuantizationAwareTraining])
def test_fit_exports_each_with_its_own_inputs(trainer: MakeTrainer, tmp_path: Path, callback: Any) -> None:
    export = DeviceExport(tmp_path / "out", target="onnxruntime", samples=4, monitor="val_loss", mode="min")
    callbacks = both(callback)
    one = trainer(*callbacks, export, LearningRateMonitor(), max_epochs=1, logger=True)
    one.fit(Coder(), small_loader(), small_loader())
    assert {name: bundle.path.name for name, bundle in export.bundles.items()} == {
        "encoder": "Encoder-w8a8-encoder",
        "parts.decoder": "Decoder-w8a8-parts.decoder",
    }
    sessions = [InferenceSession(str(bundle.qdq)) for bundle in export.bundles.values()]
    assert [[value.shape[1:] for value in session.get_inputs()] for session in sessions] == [[[3, 8, 8]], [[6]]]
    assert len(export.reports) == 2
    for report in export.reports:
        assert report.metric.keys() == {"float", "simulation", "device"}
    for name, found in zip(("encoder", "parts.decoder"), callbacks, strict=True):
        page = (tmp_path / "out" / f"{export.bundles[name].path.name}.report/report.html").read_text()
        assert f"network=&#39;{found.network_name}&#39;" in page or f"network='{found.network_name}'" in page


def test_one_of_them_exported(trainer: MakeTrainer, tmp_path: Path) -> None:
    export = DeviceExport(tmp_path / "out", target=None, network="parts.decoder", report=False)
    trainer(*both(PostTrainingQuantization), export).fit(Coder(), small_loader(), small_loader())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Decoder-w8a8"]
    unknown = DeviceExport(tmp_path / "out", target=None, network="decoder")
    with pytest.raises(ConfigurationError, match=r"network='decoder'.*'encoder', 'parts.decoder'"):
        trainer(*both(PostTrainingQuantization), unknown).fit(Coder(), small_loader())


def ptq(*names: str) -> list[Any]:
    return [PostTrainingQuantization(network=name) for name in names]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: ptq("encoder", "encoder"), "one quantization callback"),
        (lambda: ptq("encoder", "encoder.conv"), "a part of the other"),
        (lambda: ptq("encoder.conv", "encoder"), "a part of the other"),
        (lambda: [*ptq("encoder"), QuantizationAwareTraining(network="parts.decoder")], "of which one ends the fit"),
        (lambda: both(QuantizationAwareTraining, max_drop=0.1, monitor="val_loss"), "max_drop or rungs"),
    ],
)
def test_what_has_no_single_meaning(trainer: MakeTrainer, callbacks: Any, message: str) -> None:
    module = Coder()
    with pytest.raises(ConfigurationError, match=message):
        trainer(*callbacks(), max_epochs=1).fit(module, small_loader(), small_loader())
    assert type(module.encoder) is Encoder


def test_names_that_only_begin_alike_are_apart(trainer: MakeTrainer) -> None:
    class Alike(Coder):
        def __init__(self) -> None:
            super().__init__()
            self.encoder_head = self.parts.pop("decoder")

        def forward(self, images: Tensor) -> Tensor:
            return self.encoder_head(self.encoder(images))

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.01)

    names = ("encoder", "encoder_head")
    one = trainer(*(QuantizationAwareTraining(network=name, distillation=0.1) for name in names), max_epochs=1)
    one.fit(Alike(), small_loader())
    assert len(one.optimizers[0].param_groups) == 3
