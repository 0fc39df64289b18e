"""Training a compiled network, by the callback's `compile`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_quant import QuantizationAwareTraining
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.callsites.attributes import is_range
from lightning_quant.simulation.callsites.watching import COMPILED
from tests.helpers.small import SmallModule, SmallNet, small_loader

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]
QUICK = {"backend": "aot_eager"}


class Watches(Callback):
    """Notes which networks are compiled in training and in validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool, bool]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.note("train", pl_module)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.note("sanity" if trainer.sanity_checking else "validation", pl_module)

    def note(self, where: str, pl_module: Any) -> None:
        compiled: Any = COMPILED.get(pl_module.model)
        self.seen.append((where, compiled is not None, compiled is not None and compiled.why_not is None))


def fitted(trainer: MakeTrainer, compile: Any, *callbacks: Callback, **arguments: Any) -> SmallModule:
    torch.manual_seed(0)
    module = SmallModule()
    callback = QuantizationAwareTraining(arguments.pop("precision", "w8a8"), compile=compile, **arguments)
    trainer(callback, *callbacks, max_epochs=2, num_sanity_val_steps=1).fit(module, small_loader(), small_loader())
    return module


@pytest.mark.parametrize("precision", ["w8a8", "w8a16"])
def test_it_ends_as_without(trainer: MakeTrainer, precision: str) -> None:
    watches = Watches()
    compiled = fitted(trainer, QUICK, watches, precision=precision)
    plain = fitted(trainer, False, precision=precision)
    assert ("train", True, True) in watches.seen
    assert ("validation", True, True) in watches.seen
    assert all(works for where, there, works in watches.seen if where != "sanity")
    assert not COMPILED
    ours, theirs = compiled.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():  # the optimizer gives a range whose gradient is nearly zero a whole step
        if isinstance(value, Tensor) and not is_range(key):
            torch.testing.assert_close(ours[key], value, rtol=2e-2, atol=2e-3)


def test_rungs_run_as_they_are_and_the_best_is_kept(trainer: MakeTrainer) -> None:
    module = SmallModule()
    callback = QuantizationAwareTraining(
        "w4a8", compile=QUICK, max_drop=-1.0, monitor="val_loss", mode="min", rungs=("ptq", "bias_correction")
    )
    trainer(callback, max_epochs=2).fit(module, small_loader(), small_loader())
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "bias_correction", "qat"]
    assert not COMPILED


class Fails(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.std() > 0:
            raise RuntimeError("of the user's own")
        return super().forward(x)


def test_an_error_of_the_network_is_the_users_own(trainer: MakeTrainer) -> None:
    module = SmallModule(Fails())
    with pytest.raises(RuntimeError, match="of the user's own"):
        trainer(QuantizationAwareTraining(compile=QUICK), max_epochs=1).fit(module, small_loader())
    assert not COMPILED


class Remembers(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_what_cannot_be_compiled_trains_as_it_is(trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    watches = Watches()
    module = SmallModule(Remembers())
    with caplog.at_level(logging.WARNING):
        trainer(QuantizationAwareTraining(compile=QUICK), watches, max_epochs=1).fit(module, small_loader())
    assert ("train", True, False) in watches.seen
    assert "Remembers is not compiled: its forward sets the attribute last" in caplog.text
    assert isinstance(module.model.last, Tensor)


@pytest.mark.parametrize(
    ("compile", "message"),
    [
        ("yes", r"expected True, False or a mapping of torch\.compile's options"),
        (None, r"expected True, False or a mapping of torch\.compile's options"),
        ({"dynamic": True}, r"expected backend, mode, options\. Remove 'dynamic'"),
        ({"mode": "fastest"}, r"torch\.compile does not take it"),
        ({"backend": "none such"}, r"torch\.compile does not take it"),
    ],
)
def test_other_values_are_refused(compile: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QuantizationAwareTraining(compile=compile)
