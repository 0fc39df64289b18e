"""How the ladder measures within a fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from lightning.pytorch import Trainer
from typing_extensions import override

import lightning_quant as lq
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.simulation.calibrate import weight_quantizers
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import SmallModule, small_loader

MakeTrainer = Callable[..., Trainer]


class Halving(Rung):
    """Halves every weight behind autograd's back, and measures before and after."""

    name = "halving"
    measured: list[float]
    quantized: list[int]

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        self.measured, self.quantized = [], []
        self.measure(network, context)
        for parameter in network.parameters():
            parameter.data.mul_(0.5)  # ranges, too
        self.measure(network, context)
        context.calibrate(network)
        return "half of every weight"

    def measure(self, network: QuantizedNetwork, context: RungContext) -> None:
        calls: list[Any] = []
        quantizer = weight_quantizers(network)[0]
        handle = quantizer.register_forward_hook(lambda *_: calls.append(None))
        self.measured.append(context.measure())
        handle.remove()
        self.quantized.append(len(calls))


def climbed(trainer: MakeTrainer) -> tuple[Halving, list[float | None]]:
    rung = Halving()
    callback = lq.QuantizationAwareTraining("w8a8", monitor="val_loss", mode="min", rungs=("ptq", rung, "cle"))
    trainer(callback, max_epochs=0).fit(SmallModule(), small_loader(), small_loader())
    return rung, [result.metric for result in callback.result.rungs]


def test_a_measurement_quantizes_each_weight_once_as_it_is_then(
    trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rung, metrics = climbed(trainer)
    monkeypatch.setattr(QuantizedNetwork, "cached_weights", lambda self: nullcontext())
    every_batch, same_metrics = climbed(trainer)
    assert rung.quantized == [1, 1]
    assert every_batch.quantized == [len(small_loader())] * 2
    assert rung.measured == every_batch.measured
    assert rung.measured[0] != rung.measured[1]
    assert metrics == same_metrics


def test_ptq_with_another_estimator_is_a_rung_of_its_own(trainer: MakeTrainer) -> None:
    rungs = ({"ptq": {"range_estimator": "tf_enhanced"}},)
    callback = lq.QuantizationAwareTraining("w8a8", monitor="val_loss", mode="min", rungs=rungs)
    trainer(callback, max_epochs=0).fit(SmallModule(), small_loader(), small_loader())
    assert [result.rung for result in callback.result.rungs] == ["tf_enhanced"]
    assert callback.result.rungs[0].changed.startswith("tf_enhanced ranges from")
