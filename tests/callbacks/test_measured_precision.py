"""What is measured means what it says: 16-bit activations are measured with all digits, whatever trains them."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

import lightning_quant as lq
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.full_precision import full_precision
from tests.helpers.small import SmallModule, encodings, small_data, small_loader

MakeTrainer = Callable[..., Trainer]
LADDER: dict[str, Any] = {"monitor": "val_loss", "mode": "min", "max_drop": -10.0}


class Noting(SmallModule):
    """Notes what its steps compute in."""

    def __init__(self) -> None:
        super().__init__()
        self._see = cast("list[tuple[str, torch.dtype]]", []).append  # no attribute that measurements put back

    def _loss(self, batch: Any) -> Tensor:
        scores = self.model(batch[0])
        if "log" not in vars(self):  # not a step that is run for the calls it makes
            self._see(("training" if torch.is_grad_enabled() else "measured", scores.dtype))
        return F.cross_entropy(scores, batch[1])

    def dtypes(self, step: str) -> set[torch.dtype]:
        seen: list[tuple[str, torch.dtype]] = self._see.__self__  # type: ignore[attr-defined]
        return {dtype for one, dtype in seen if one == step}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_16_bit_activations_are_measured_as_in_32_true(trainer: MakeTrainer, stage: str) -> None:
    results = []
    for precision in ("32-true", "bf16-mixed"):
        one = trainer(lq.PostTrainingQuantization("w8a16", calibration_dataloader=small_loader()), precision=precision)
        found: Any = getattr(one, stage)(SmallModule(), small_loader())
        results.append([float(v) for metrics in found for v in metrics.values()] if stage != "predict" else found)
    if stage == "predict":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    else:
        assert results[0] == results[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_ladder_compares_what_32_true_compares(trainer: MakeTrainer, precision: str) -> None:
    known = []
    for one in ("32-true", precision):
        callback = lq.QuantizationAwareTraining("w8a16", rungs=("ptq", "bias_correction"), **LADDER)
        module = Noting()
        trainer(callback, max_epochs=1, precision=one).fit(module, small_loader(), small_loader())
        known.append((callback.result.float_metric, *(rung.metric for rung in callback.result.rungs[:-1])))
        assert module.dtypes("measured") == {torch.float32}
        assert module.dtypes("training") == {torch.float32 if one == "32-true" else torch.bfloat16}
        assert callback.result.rungs[-1].metric is not None
    assert known[0] == known[1]


def test_8_bits_are_measured_in_what_the_user_chose(trainer: MakeTrainer) -> None:
    module = Noting()
    callback = lq.QuantizationAwareTraining("w8a8", **LADDER)
    trainer(callback, max_epochs=1, precision="bf16-mixed").fit(module, small_loader(), small_loader())
    assert module.dtypes("measured") == module.dtypes("training") == {torch.bfloat16}


def test_one_layer_with_16_bits_is_enough(trainer: MakeTrainer) -> None:
    module = Noting()
    callback = lq.PostTrainingQuantization("w8a8", overrides={"head": "w8a16"}, calibration_dataloader=small_loader())
    trainer(callback, precision="bf16-mixed").validate(module, small_loader(), verbose=False)
    assert module.dtypes("measured") == {torch.float32}


class Widening(Rung):
    """Gives every activation 16 bits."""

    name = "widening"
    refines = True

    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        for quantizer in network.quantizers():
            quantizer.bitwidth = 16
        context.calibrate(network)
        return "all"


def test_what_a_rung_may_refine_is_compared_with_float_in_full(trainer: MakeTrainer) -> None:
    module = Noting()
    rungs = ("ptq", "tests.callbacks.test_measured_precision.Widening")
    callback = lq.QuantizationAwareTraining("w8a8", rungs=rungs, **LADDER)
    trainer(callback, max_epochs=0, precision="bf16-mixed").fit(module, small_loader(), small_loader())
    reference = lq.QuantizationAwareTraining("w8a8", rungs=rungs, **LADDER)
    trainer(reference, max_epochs=0).fit(SmallModule(), small_loader(), small_loader())
    assert module.dtypes("measured") == {torch.float32}
    assert callback.result.float_metric == reference.result.float_metric
    assert [rung.metric for rung in callback.result.rungs] == [rung.metric for rung in reference.result.rungs]


# What the user set


SWITCHES = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, of one": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "newer, of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, of the CPU": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}
OPERATIONS = ("cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul")


def switches() -> dict[str, Any]:
    """All switches, in both words; reading the older ones may raise."""
    found: dict[str, Any] = {}
    for operation in OPERATIONS:
        backend, _, name = operation.partition(".")
        found[operation] = getattr(getattr(torch.backends, backend), name).fp32_precision
    readers: dict[str, Callable[[], Any]] = {
        "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "matmul": torch.get_float32_matmul_precision,
    }
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "mixed"
    return found


def check_switches(as_set: str) -> None:
    SWITCHES[as_set]()
    before, inside = switches(), {}
    with contextlib.suppress(ZeroDivisionError), full_precision():
        inside = switches()
        1 / 0  # noqa: B018
    assert switches() == before, (before, switches())
    assert {inside[name] for name in OPERATIONS} <= {"ieee", "none"}, inside
    if "mixed" not in before.values():
        assert "mixed" not in inside.values(), inside


def test_switches_are_off_inside_and_back_afterwards() -> None:
    """Each in a fork of its own: some settings cannot be taken back."""
    script = """
import multiprocessing
from tests.callbacks.test_measured_precision import SWITCHES, check_switches

fork = multiprocessing.get_context("fork")
for as_set in SWITCHES:
    process = fork.Process(target=check_switches, args=(as_set,))
    process.start()
    process.join()
    assert process.exitcode == 0, as_set
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "arn" not in done.stderr


def older_switches() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


class Switches(Callback):
    """Notes what the network runs with, once the stage has begun, and what it is calibrated with."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {"training": [], "measured": [], "calibration": []}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(*_: Any) -> None:
            self.seen["training" if torch.is_grad_enabled() else "measured"].append(older_switches())

        cast("nn.Module", pl_module.model).register_forward_pre_hook(note)


class Samples(Dataset[Any]):
    """Notes what they are read with."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        self.seen.append(older_switches())
        return small_data()[index]


@pytest.mark.parametrize(("precision", "measured"), [("w8a16", (False, "highest")), ("w8a8", (True, "high"))])
def test_no_tf32_where_it_would_be_measured(trainer: MakeTrainer, precision: str, measured: Any) -> None:
    module, noted = SmallModule(), Switches()
    torch.set_float32_matmul_precision("high")
    try:
        rungs = ("ptq", "bias_correction")
        calibration = small_loader(Samples(noted.seen["calibration"]))
        callback = lq.QuantizationAwareTraining(precision, rungs=rungs, calibration_dataloader=calibration, **LADDER)
        one = trainer(callback, noted, max_epochs=1)
        plugin = one.precision_plugin
        one.fit(module, small_loader(), small_loader())
        assert older_switches() == (True, "high")
        assert "val_step_context" not in vars(plugin)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(noted.seen["training"]) == {(True, "high")}
    assert set(noted.seen["measured"]) == set(noted.seen["calibration"]) == {measured}


def test_a_failing_step_leaves_the_trainer_as_it_was(trainer: MakeTrainer) -> None:
    class Failing(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if "log" not in vars(self):
                raise RuntimeError("mine")
            super().validation_step(batch, batch_idx)

    one = trainer(lq.PostTrainingQuantization("w8a16", calibration_dataloader=small_loader()), precision="bf16-mixed")
    with pytest.raises(RuntimeError, match="mine"):
        one.validate(Failing(), small_loader(), verbose=False)
    assert not {"val_step_context", "test_step_context", "predict_step_context"} & vars(one.precision_plugin).keys()
    assert torch.backends.cudnn.allow_tf32


def test_autocast_is_off_inside() -> None:
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert (ones @ ones).dtype == torch.float32
        assert (ones @ ones).dtype == torch.bfloat16


# What is reported to the user


@pytest.mark.parametrize(
    ("bits", "precision", "line"),
    [
        (
            "w8a16",
            "bf16-mixed",
            "Training computes in bf16-mixed; what is measured and reported is computed in ",
        ),
        ("w8a8", "bf16-mixed", "Training and what is measured compute in bf16-mixed."),
        ("w8a8", "32-true", ""),
        ("w8a16", "32-true", ""),
    ],
)
def test_said_once(
    trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, bits: str, precision: str, line: str
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        one = trainer(lq.QuantizationAwareTraining(bits), max_epochs=1, precision=precision)
        one.fit(SmallModule(), small_loader(), small_loader())
    said = [message for message in caplog.messages if "measured" in message]
    assert len(said) == bool(line)
    assert all(one.startswith(line) for one in said)


def test_calibration_is_that_of_32_true(trainer: MakeTrainer) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module = SmallModule()
        one = trainer(lq.PostTrainingQuantization("w8a16", calibration_dataloader=small_loader()), precision=precision)
        one.validate(module, small_loader(), verbose=False)
        found.append(encodings(module.quantized))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
