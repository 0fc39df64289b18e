"""A project on ``pytorch_lightning``: one clear sentence, before anything is done to its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant import (
    DeviceExport,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    ResumePoint,
    load_quantized,
)
from lightning_quant.errors import ConfigurationError
from tests.helpers.small import SmallNet, small_loader, small_net

old = pytest.importorskip("pytorch_lightning", reason="needs the package of the old name")


class OldModule(old.LightningModule):  # type: ignore[name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = small_net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    "make",
    [
        PostTrainingQuantization,
        QuantizationAwareTraining,
        lambda: QuantizationAwareTraining(max_drop=0.1, monitor="val_loss"),
        DeviceExport,
        lambda: ResumePoint("last.ckpt"),
    ],
)
def test_callbacks_say_what_to_import(tmp_path: Path, make: Any, stage: str) -> None:
    trainer = old.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[make()],
    )
    module = OldModule()
    data = (small_loader(), small_loader()) if stage == "fit" else (small_loader(),)
    with pytest.raises(ConfigurationError, match=r"'pytorch_lightning'.*`import lightning\.pytorch as pl`"):
        getattr(trainer, stage)(module, *data)
    assert type(module.model) is SmallNet


def test_loading_says_what_to_import(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"OldModule.*'pytorch_lightning'.*lightning\.pytorch"):
        load_quantized(OldModule, tmp_path / "any.ckpt")
