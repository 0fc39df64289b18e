"""Training that comes to NaN or infinity stops, says where, and leaves the weights of the step before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import lightning_quant as lq
from lightning_quant.errors import TrainingError
from tests.small import SIZE, SmallModule, assert_same_tensors, small_loader

STEP = 5


class Relative(nn.Module):
    """NaN for an image that is black: the mean of an empty selection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.head = nn.Linear(4 * (SIZE - 2) ** 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x - x[x > 0].mean()).flatten(1))


class Spoilt(SmallModule):
    """Something becomes NaN in the sixth step."""

    def __init__(self, what: str) -> None:
        super().__init__(Relative(), lambda module: SGD(module.parameters(), lr=1e-3))
        self.what = what
        self.before: dict[str, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        if self.global_step == STEP:
            self.before = {name: value.clone() for name, value in self.state_dict().items() if torch.is_tensor(value)}
            if self.what == "batch":
                images[0, 0, 0, 0] = torch.nan
            elif self.what == "layer":
                images = torch.zeros_like(images)
        loss = super().training_step((images, labels), batch_idx)
        return loss * torch.inf if self.what == "loss" and self.global_step == STEP else loss


def fit(module: pl.LightningModule, callback: pl.Callback, folder: Path) -> None:
    pl.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, default_root_dir=folder, callbacks=[callback],
        num_sanity_val_steps=0, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    ).fit(module, small_loader(), small_loader())  # fmt: skip


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("batch", "the batch itself holds NaN or Inf"),
        ("layer", "the output of layer 'mean' is the first that is not finite"),
        ("loss", "it comes from the loss or its gradient"),
    ],
)
def test_step_and_layer_are_named_and_the_step_is_not_taken(tmp_path: Path, what: str, where: str) -> None:
    module = Spoilt(what)
    callback = lq.QuantizationAwareTraining("w8a8", calibration_samples=16)
    with pytest.raises(TrainingError, match=r"Step 6 \(epoch 1, batch 1\)") as raised:
        fit(module, callback, tmp_path)
    assert where in str(raised.value)
    now = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    assert_same_tensors(now, module.before)


def test_after_rungs_it_ends_with_the_best_network(tmp_path: Path) -> None:
    module = Spoilt("loss")
    monitor: dict[str, Any] = {"monitor": "val_loss", "mode": "min", "max_drop": -10.0}
    callback = lq.QuantizationAwareTraining("w8a8", calibration_samples=16, **monitor)
    with pytest.warns(UserWarning, match=r"Step 6 \(epoch 1.*Training ends here, with the best network so far"):
        fit(module, callback, tmp_path)
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "qat"]
    best = torch.load(callback.best_model_path, weights_only=True)["state_dict"]
    now = {name: value for name, value in module.state_dict().items() if torch.is_tensor(value)}
    assert_same_tensors(now, {name: best[name] for name in now})
    if callback.result.rungs[-1].kept:  # trained for five steps and validated after them
        assert_same_tensors(now, module.before)
