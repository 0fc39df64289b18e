"""Weights that turn back and forth between two integers: counted as in the paper, frozen, logged and resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.callbacks.oscillation import WeightOscillation
from lightning_quant.errors import ConfigurationError
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.simulation.quantized_tensors import rounded_weights
from tests.helpers.small import SmallModule, assert_same_tensors, small_loader, small_net
from tests.ladder.rungs.test_call_sites import OwnConv

MakeTrainer = Callable[..., Trainer]
HEAD = "head.weight"


def calibrated(trainer: MakeTrainer, network: nn.Module | None = None) -> QuantizedNetwork:
    module = SmallModule(network)
    trainer(lq.PostTrainingQuantization("w4a8", calibration_dataloader=small_loader())).validate(
        module, small_loader(), verbose=False
    )
    return module.quantized


def put(network: QuantizedNetwork, integers: Tensor) -> None:
    """Give the head weights that are rounded to these integers."""
    weight, quantizer = rounded_weights(network)[HEAD]
    with torch.no_grad():
        weight.copy_((integers + 0.2) * quantizer.get_scale())


def integers_of(network: QuantizedNetwork, name: str = HEAD) -> Tensor:
    weight, quantizer = rounded_weights(network)[name]
    return (weight.detach() / quantizer.get_scale()).round().clamp(quantizer.qmin, quantizer.qmax)


def frequencies(path: list[int]) -> list[float]:
    """The paper's equations 7 and 8 for one weight, word by word."""
    frequency, direction, found = 0.0, 0, []
    for before, after in itertools.pairwise(path):
        change = (after > before) - (after < before)
        turned = change != 0 and direction != 0 and change != direction
        frequency = 0.01 * turned + (1 - 0.01) * frequency
        direction = change or direction
        found.append(frequency)
    return found


PATHS = [
    [3, 4, 3, 4, 3, 4, 3],  # turns at every step
    [3, 3, 4, 4, 3, 3, 4],  # turns with pauses
    [0, 1, 2, 3, 4, 5, 6],  # moves, never turns
    [2, 2, 2, 2, 2, 2, 2],
    [-1, -3, -2, -2, -6, -6, -5],  # steps of several integers
]


def test_turns_are_those_of_the_paper(trainer: MakeTrainer) -> None:
    network = calibrated(trainer)
    path = torch.zeros(7, 4, 6)
    for place, values in enumerate(PATHS):
        path[:, 0, place] = torch.tensor(values, dtype=torch.float32)
    put(network, path[0])
    oscillation = WeightOscillation(network, freeze=False)
    for step in range(1, 7):
        put(network, path[step])
        oscillation.step(progress=0.0)
    known = oscillation.state_dict()["weights"][HEAD]
    for place, values in enumerate(PATHS):
        assert float(known["frequency"][0, place]) == pytest.approx(frequencies(values)[-1], abs=1e-7)
    # three of them turn in more than one step of two hundred; what is noted is their share of all weights
    total = sum(weight.numel() for weight, _ in rounded_weights(network).values())
    assert oscillation.note(6) == {"oscillation/weights": 3 / total}
    assert oscillation.note(6) == {}
    assert torch.equal(integers_of(network), path[-1]), "noting changes nothing"


def test_a_frozen_weight_stays_where_it_was_on_average(trainer: MakeTrainer) -> None:
    network = calibrated(trainer)
    still = torch.zeros(4, 6)
    put(network, still + 3)
    oscillation = WeightOscillation(network, freeze=True)
    up = torch.zeros(4, 6)
    up[0, 0] = 1
    for step in range(200):  # of four steps three at 3
        put(network, still + 3 + up * (step % 4 == 0))
        oscillation.step(progress=1.0)
    frozen = oscillation.state_dict()["weights"][HEAD]["frozen"]
    assert frozen.nonzero().tolist() == [[0, 0]]
    _, quantizer = rounded_weights(network)[HEAD]
    quantizer.set_range(quantizer.get_min() * 1.5, quantizer.get_max() * 1.5)  # ranges learn
    put(network, still - 2)
    oscillation.step(progress=1.0)
    after = integers_of(network)
    assert float(after[0, 0]) == 3
    assert bool((after.flatten()[1:] == -2).all())


def test_the_threshold_sinks(trainer: MakeTrainer) -> None:
    """A weight that turns in every fiftieth step is frozen at the end of training, not at its start."""

    def frozen(progress: float) -> bool:
        network = calibrated(trainer)
        put(network, torch.zeros(4, 6))
        oscillation = WeightOscillation(network, freeze=True)
        for step in range(600):
            put(network, torch.full((4, 6), float(step // 40 % 2)))
            oscillation.step(progress)
        return bool(oscillation.state_dict()["weights"][HEAD]["frozen"].any())

    assert frozen(1.0)
    assert not frozen(0.0)


def train(
    trainer: MakeTrainer, oscillations: Any, epochs: int = 3, network: nn.Module | None = None, **options: Any
) -> tuple[SmallModule, lq.QuantizationAwareTraining]:
    module = SmallModule(network, optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    quantization = lq.QuantizationAwareTraining("w4a8", oscillations=oscillations)
    one = trainer(quantization, max_epochs=epochs, log_every_n_steps=1, **options)
    one.fit(module, small_loader(), small_loader())
    return module, quantization


def test_noting_trains_the_same_and_logs_the_share(trainer: MakeTrainer, tmp_path: Path) -> None:
    plain, without = train(trainer, None, epochs=12)
    logger = CSVLogger(tmp_path)
    noted, quantization = train(trainer, "note", epochs=12, logger=logger)
    assert_same_tensors(plain.state_dict(), noted.state_dict())
    assert without.oscillation is None
    found = quantization.oscillation
    assert found is not None
    assert found.steps == list(range(1, 49))
    assert max(found.oscillating) > 0
    assert not any(found.frozen)
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "oscillation/weights" in logged
    assert "oscillation/frozen" not in logged


def test_freezing_ends_with_fewer_oscillating_weights(trainer: MakeTrainer) -> None:
    _, noted = train(trainer, "note", epochs=30)
    module, frozen = train(trainer, "freeze", epochs=30)
    assert noted.oscillation is not None
    assert frozen.oscillation is not None
    assert frozen.oscillation.frozen[-1] > 0
    assert frozen.oscillation.oscillating[-1] < noted.oscillation.oscillating[-1] / 2
    assert all(bool(one.isfinite().all()) for one in module.parameters())


def test_weights_that_code_passes_to_a_function_are_frozen_too(trainer: MakeTrainer) -> None:
    network = small_net()
    own = OwnConv(6, 6, 3, padding=1)
    own.load_state_dict(network.branch.state_dict())
    network.branch = own
    module, quantization = train(trainer, "freeze", epochs=30, network=network)
    assert quantization.oscillation is not None
    state = quantization.oscillation.state_dict()["weights"]
    assert "branch.weight" in state
    frozen = state["branch.weight"]["frozen"]
    assert bool(frozen.any())
    integers = integers_of(module.quantized, "branch.weight")
    assert torch.equal(integers[frozen], state["branch.weight"]["integers"][frozen])


class StopAfter(pl.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epoch


@pytest.mark.parametrize("oscillations", ["note", "freeze"])
def test_a_resumed_fit_ends_with_the_same_bits(trainer: MakeTrainer, tmp_path: Path, oscillations: str) -> None:
    def run(stop: int, checkpoint: Path | None = None) -> tuple[SmallModule, lq.QuantizationAwareTraining]:
        quantization = lq.QuantizationAwareTraining("w4a8", oscillations=oscillations)  # type: ignore[arg-type]
        module = SmallModule(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
        one = trainer(quantization, StopAfter(stop), max_epochs=15, log_every_n_steps=1)
        one.fit(module, small_loader(), small_loader(), ckpt_path=checkpoint, weights_only=True)
        one.save_checkpoint(tmp_path / f"{stop}.ckpt")
        return module, quantization

    run(7)
    (resumed, again), (whole, once) = run(15, tmp_path / "7.ckpt"), run(15)
    assert len(resumed.trained_on) == 32
    assert_same_tensors(resumed.state_dict(), whole.state_dict())
    assert again.oscillation is not None
    assert once.oscillation is not None
    assert again.oscillation.oscillating == once.oscillation.oscillating
    assert again.oscillation.frozen == once.oscillation.frozen
    assert any(once.oscillation.frozen) == (oscillations == "freeze")


def test_gradients_of_several_batches_are_one_step(trainer: MakeTrainer) -> None:
    module = SmallModule()
    quantization = lq.QuantizationAwareTraining("w4a8", oscillations="note")
    counted: list[float] = []
    one = trainer(quantization, max_epochs=1, accumulate_grad_batches=2)
    original = WeightOscillation.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightOscillation, "step", lambda self, at: (counted.append(at), original(self, at)))
        one.fit(module, small_loader(), small_loader())
    assert counted == [0.5, 1.0]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'note', 'freeze' or None"):
        lq.QuantizationAwareTraining("w4a8", oscillations="thaw")  # type: ignore[arg-type]
