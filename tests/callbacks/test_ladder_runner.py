"""The ladder in a Trainer: measured by the user's own validation, trained only when no rung is good enough."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD, AdamW
from typing_extensions import override

import lightning_quant as lq
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.ladder.rung import Rung, RungContext
from lightning_quant.simulation.calibrate import calibrate, weight_quantizers
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import (
    EpochSampler,
    SmallModule,
    SmallNet,
    assert_same_tensors,
    small_data,
    small_loader,
    small_net,
)
from tests.helpers.trainers import quiet_trainer

MakeTrainer = Callable[..., Trainer]
ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.callbacks.test_ladder_runner"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SmallNet:
    """A float network that has learned its data."""
    torch.manual_seed(0)
    module = SmallModule(small_net())
    folder = tmp_path_factory.mktemp("float")
    quiet_trainer(folder, max_epochs=25).fit(module, small_loader())
    return module.model.eval()


def data() -> Any:
    return small_loader(small_data(), sampler=EpochSampler(32))


def module_of(network: SmallNet, learning_rate: float = 1e-3) -> SmallModule:
    return SmallModule(copy.deepcopy(network), lambda module: AdamW(module.parameters(), lr=learning_rate))


def qat(precision: str = "w4a8", **arguments: Any) -> lq.QuantizationAwareTraining:
    return lq.QuantizationAwareTraining(precision, **{"monitor": "val_loss", "mode": "min", **arguments})


def fit(trainer: MakeTrainer, module: SmallModule, *callbacks: Any, ckpt_path: Any = None, **arguments: Any) -> Trainer:
    one = trainer(*callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 0, **arguments})
    one.fit(module, data(), small_loader(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return one


def val_loss(trainer: MakeTrainer, module: SmallModule, *callbacks: Any) -> float:
    (metrics,) = trainer(*callbacks).validate(module, small_loader(), verbose=False)
    return metrics["val_loss"]


# The gate


def test_float_is_measured_by_the_users_own_validation(trainer: MakeTrainer, trained: SmallNet) -> None:
    callback = qat("w8a8", max_drop=1.0)
    fit(trainer, module_of(trained), callback)
    assert callback.result.float_metric == pytest.approx(val_loss(trainer, module_of(trained)), rel=1e-6)


def test_no_training_happens_when_a_rung_suffices(
    trainer: MakeTrainer, trained: SmallNet, caplog: pytest.LogCaptureFixture
) -> None:
    module, callback = module_of(trained), qat("w8a8", max_drop=0.1, rungs=("ptq", "seq_mse"))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        one = fit(trainer, module, callback)
    assert one.global_step == 0
    assert "training" not in module.called
    assert "No training: val_loss" in caplog.text
    assert [rung.rung for rung in callback.result.rungs] == ["ptq"]
    (rung,) = callback.result.rungs
    assert rung.kept
    assert rung.reason == "within 0.1 of float"
    assert val_loss(trainer, module, callback) == rung.metric
    plain = module_of(trained)
    fit(trainer, plain, lq.PostTrainingQuantization("w8a8"))
    assert_same_tensors(module.state_dict(), plain.state_dict())


def test_it_trains_when_no_rung_suffices_and_ends_with_the_best(trainer: MakeTrainer, trained: SmallNet) -> None:
    module, callback = module_of(trained), qat(max_drop=-10.0)
    one = fit(trainer, module, callback, max_epochs=4)
    assert one.global_step == 16
    ptq, trained_rung = callback.result.rungs
    assert (ptq.rung, trained_rung.rung) == ("ptq", "qat")
    assert trained_rung.kept
    assert trained_rung.metric < ptq.metric
    assert val_loss(trainer, module, callback) == trained_rung.metric
    loaded = lq.load_quantized(SmallModule, callback.best_model_path)
    assert_same_tensors(loaded.state_dict(), module.state_dict())


def test_the_best_is_kept_though_training_goes_wrong_later(trainer: MakeTrainer, trained: SmallNet) -> None:
    def falling(module: SmallModule) -> Any:
        optimizer = AdamW(module.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 if step < 8 else 1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module, callback = SmallModule(copy.deepcopy(trained), falling), qat(max_drop=-10.0)
    fit(trainer, module, callback, max_epochs=4)
    assert callback.result.best is not None
    assert callback.result.best.rung == "qat"
    assert val_loss(trainer, module, callback) == callback.result.best.metric


def test_training_that_hurts_is_rolled_back_bit_for_bit(trainer: MakeTrainer, trained: SmallNet) -> None:
    module, callback = module_of(trained, learning_rate=10.0), qat(max_drop=-10.0)
    fit(trainer, module, callback)
    assert [rung.kept for rung in callback.result.rungs] == [True, False]
    plain = module_of(trained)
    fit(trainer, plain, lq.PostTrainingQuantization("w4a8"))
    assert_same_tensors(module.state_dict(), plain.state_dict())


def test_training_stops_once_within_the_bound_and_no_longer_improving(trainer: MakeTrainer, trained: SmallNet) -> None:
    probe = qat(max_drop=-10.0)
    fit(trainer, module_of(trained), probe, max_epochs=1)
    ptq, first_epoch = (rung.drop for rung in probe.result.rungs)
    assert first_epoch < ptq
    bound = (ptq + first_epoch) / 2
    stalls = SmallModule(copy.deepcopy(trained), lambda m: _stalling(m))
    callback = qat(max_drop=bound)
    one = fit(trainer, stalls, callback, max_epochs=10)
    assert callback.result.satisfied
    assert one.global_step == 8  # the first epoch is within the bound, the second no better


def _stalling(module: SmallModule) -> Any:
    optimizer = AdamW(module.parameters(), lr=1e-3, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 0.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_training_without_validation_is_validated_at_its_end(trainer: MakeTrainer, trained: SmallNet) -> None:
    callback = qat(max_drop=-10.0)
    module = module_of(trained)
    fit(trainer, module, callback, max_epochs=2, check_val_every_n_epoch=5)
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "qat"]
    assert callback.result.best is not None
    assert val_loss(trainer, module, callback) == callback.result.best.metric


def test_no_epochs_climb_without_training(trainer: MakeTrainer, trained: SmallNet) -> None:
    module, callback = module_of(trained), qat(max_drop=-10.0, rungs=("ptq", "bias_correction"))
    one = fit(trainer, module, callback, max_epochs=0)
    assert one.global_step == 0
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "bias_correction"]


def test_without_a_bound_every_rung_is_tried_and_training_follows(trainer: MakeTrainer, trained: SmallNet) -> None:
    callback = qat(rungs=("ptq", "bias_correction"))
    one = fit(trainer, module_of(trained), callback)
    assert one.global_step == 8
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "bias_correction", "qat"]


def test_by_default_nothing_is_measured(trainer: MakeTrainer, trained: SmallNet) -> None:
    module = module_of(trained)
    callback = lq.QuantizationAwareTraining("w4a8")
    fit(trainer, module, callback, limit_val_batches=0)
    assert callback.result.rungs == []
    assert "validation" not in module.called
    assert callback.best_model_path == ""


# With other callbacks and loggers


def test_measuring_is_hidden_from_callbacks_that_decide_and_from_the_logger(
    trainer: MakeTrainer, trained: SmallNet, tmp_path: Path
) -> None:
    stopping = EarlyStopping("val_loss", patience=5)
    saving = ModelCheckpoint(tmp_path / "saved", monitor="val_loss", save_top_k=-1, filename="{epoch}")
    logger = CSVLogger(tmp_path, name="logs", version="run")
    callback = qat(max_drop=-10.0, rungs=("ptq", "bias_correction"))
    arguments = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 1}
    fit(trainer, module_of(trained), callback, stopping, saving, **arguments)
    assert float(stopping.best_score) != pytest.approx(callback.result.float_metric)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    header, *rows = (tmp_path / "logs/run/metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert {"ladder/ptq/val_loss", "ladder/ptq/drop", "ladder/qat/val_loss"} <= set(columns)
    column = columns.index("val_loss")
    assert sum(row.split(",")[column] != "" for row in rows) == 2  # the validations of the two epochs
    assert callback.best_model_path == str(tmp_path / "logs/run/ladder/best.ckpt")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": 0.1, "monitor": ""}, "max_drop=0.1 with monitor=''"),
        ({"max_drop": "a lot"}, "max_drop='a lot': expected a number"),
        ({"max_drop": float("nan")}, "max_drop=nan: expected a number"),
        ({"max_drop": 0.1, "mode": "most"}, "mode='most': expected 'max' or 'min'"),
        ({"rungs": ("ptq", "adaronud")}, "Unknown rung 'adaronud'.*Did you mean 'adaround'"),
        ({"rungs": ("ptq", "qat")}, "training follows the rungs by itself"),
        ({"distillation": -1.0}, "distillation=-1.0: expected a weight of at least 0"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        qat(**arguments)


def test_a_metric_that_is_not_logged(trainer: MakeTrainer, trained: SmallNet) -> None:
    with pytest.raises(ConfigurationError, match=r"monitor='val_miou' was not logged.*expected one of 'val_loss'"):
        fit(trainer, module_of(trained), qat(max_drop=0.1, monitor="val_miou"))


def test_a_float_metric_that_is_nan(trainer: MakeTrainer, trained: SmallNet) -> None:
    class Nan(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self._loss(batch) * float("nan"))

    with pytest.raises(ConfigurationError, match="val_loss of the float network is NaN"):
        fit(trainer, Nan(copy.deepcopy(trained)), qat(max_drop=0.1))


def test_a_float_network_no_better_than_chance_gives_a_warning(trainer: MakeTrainer) -> None:
    with pytest.warns(UserWarning, match="no better than chance"):
        fit(trainer, SmallModule(small_net(3)), qat("w8a8", max_drop=1.0))


def test_a_wrong_mode_gives_a_warning(trainer: MakeTrainer, trained: SmallNet) -> None:
    with pytest.warns(UserWarning, match=r"no better than chance.*Is mode right"):
        fit(trainer, module_of(trained), qat("w8a8", max_drop=1.0, mode="max"))


def test_a_trained_network_gives_no_warning(
    trainer: MakeTrainer, trained: SmallNet, recwarn: pytest.WarningsRecorder
) -> None:
    fit(trainer, module_of(trained), qat("w8a8", max_drop=1.0))
    assert not [one for one in recwarn if "chance" in str(one.message)]


def test_no_validation_data(trainer: MakeTrainer, trained: SmallNet) -> None:
    module = module_of(trained)
    with pytest.raises(ConfigurationError, match="fit has no validation"):
        trainer(qat(max_drop=0.1), max_epochs=1).fit(module, data())
    assert isinstance(module.model, SmallNet)


def test_a_rung_that_the_hardware_does_not_allow(trainer: MakeTrainer, trained: SmallNet) -> None:
    module = module_of(trained)
    with pytest.raises(ConfigurationError, match="'bn_reestimation' with hardware='htp_v66'"):
        fit(trainer, module, qat(max_drop=0.1, hardware="htp_v66", rungs=("ptq", "bn_reestimation")))
    assert module.called == []


def test_averaged_weights_cannot_be_judged(trainer: MakeTrainer, trained: SmallNet) -> None:
    with pytest.raises(ConfigurationError, match=r"EMAWeightAveraging.*validates averaged weights"):
        fit(trainer, module_of(trained), qat(max_drop=0.1), EMAWeightAveraging())


def test_a_module_that_is_quantized_already(trainer: MakeTrainer, trained: SmallNet) -> None:
    module = module_of(trained)
    fit(trainer, module, lq.PostTrainingQuantization("w4a8"))
    with pytest.raises(ConfigurationError, match="a module that is quantized already"):
        fit(trainer, module, qat(max_drop=0.1))


# Stopping anywhere and resuming


class Shift(Rung):
    """Adds a constant to the head's bias; fails on demand."""

    name = "shift"
    amount = 0.0
    fails: Callable[[], None] | None = None

    @override
    def apply(self, network: QuantizedNetwork, context: RungContext) -> str:
        if Shift.fails is not None:
            Shift.fails()
        network.get_parameter("network.head.bias").add_(self.amount)
        calibrate(network, context.samples(), weights=False)
        return "shifted"


RUNGS = ("ptq", "bias_correction", f"{HERE}.Shift", "seq_mse")


def fail() -> None:
    raise RuntimeError("the power went out")


@pytest.mark.parametrize("max_epochs", [0, 2])
def test_a_fit_stopped_in_the_ladder_is_resumed(
    trainer: MakeTrainer, trained: SmallNet, monkeypatch: pytest.MonkeyPatch, max_epochs: int, tmp_path: Path
) -> None:
    whole, expected = module_of(trained), qat(max_drop=-10.0, rungs=RUNGS)
    fit(trainer, whole, expected, max_epochs=max_epochs, default_root_dir=tmp_path / "whole")

    stopped = qat(max_drop=-10.0, rungs=RUNGS)
    monkeypatch.setattr(Shift, "fails", staticmethod(fail))
    with pytest.raises(RuntimeError, match="the power went out"):
        fit(trainer, module_of(trained), stopped, max_epochs=max_epochs)
    monkeypatch.setattr(Shift, "fails", None)

    fresh = SmallModule(small_net(7), lambda module: AdamW(module.parameters(), lr=1e-3))  # its weights are replaced
    callback = qat(max_drop=-10.0, rungs=RUNGS)
    fit(trainer, fresh, callback, ckpt_path=stopped.best_model_path, max_epochs=max_epochs)
    names = [rung.rung for rung in callback.result.rungs]
    assert names == ["ptq", "bias_correction", "shift", "seq_mse", *(["qat"] if max_epochs else [])]
    assert [rung.metric for rung in callback.result.rungs] == [rung.metric for rung in expected.result.rungs]
    assert callback.result.rungs[0].seconds == stopped.result.rungs[0].seconds  # not run again
    assert_same_tensors(fresh.state_dict(), whole.state_dict())


def test_what_a_run_resumes_from_stays_as_it_is(trainer: MakeTrainer, trained: SmallNet, tmp_path: Path) -> None:
    first = qat(max_drop=-10.0)
    fit(trainer, module_of(trained), first, max_epochs=0, default_root_dir=tmp_path / "first")
    kept = Path(first.best_model_path).read_bytes()
    for name in ("second", "third"):  # both train, and from the same network
        callback = qat(max_drop=-10.0)
        fit(
            trainer, module_of(trained), callback,
            ckpt_path=first.best_model_path, max_epochs=2, default_root_dir=tmp_path / name,
        )  # fmt: skip
        assert [rung.rung for rung in callback.result.rungs] == ["ptq", "qat"]
        assert callback.result.rungs[-1].kept  # it improved, and so was written
        assert callback.best_model_path == str(tmp_path / name / "ladder" / "best.ckpt")
        assert Path(first.best_model_path).read_bytes() == kept


@pytest.mark.slow
def test_a_kill_in_a_rung_leaves_a_checkpoint_to_resume_from(
    trainer: MakeTrainer, trained: SmallNet, tmp_path: Path
) -> None:
    torch.save(trained.state_dict(), tmp_path / "float.pt")
    script = f"""
import os, signal, sys, torch
from {HERE} import Shift, RUNGS, module_of, qat, data
from tests.helpers.small import small_loader, small_net
from tests.helpers.trainers import quiet_trainer
torch.set_num_threads(1)
network = small_net(); network.load_state_dict(torch.load("float.pt"))
Shift.fails = staticmethod(lambda: os.kill(os.getpid(), signal.SIGKILL))
one = quiet_trainer(".", qat(max_drop=-10.0, rungs=RUNGS), max_epochs=0, num_sanity_val_steps=0)
one.fit(module_of(network.eval()), data(), small_loader())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=300, check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    callback = qat(max_drop=-10.0, rungs=RUNGS)
    fit(trainer, module_of(small_net(7)), callback, ckpt_path=tmp_path / "ladder/best.ckpt", max_epochs=0)
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "bias_correction", "shift", "seq_mse"]


def test_a_fit_stopped_in_training_is_resumed(trainer: MakeTrainer, trained: SmallNet, tmp_path: Path) -> None:
    whole, expected = module_of(trained), qat(max_drop=-10.0)
    fit(trainer, whole, expected, max_epochs=4)

    stopped = qat(max_drop=-10.0)
    one = fit(trainer, module_of(trained), stopped, max_epochs=2, default_root_dir=tmp_path / "two")
    # what a periodic checkpoint would have held: the weights of the second epoch
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    again = fit(
        trainer, module_of(trained), qat(max_drop=-10.0), saving,
        max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path / "saving",
    )  # fmt: skip
    assert one.global_step == again.global_step == 8
    fresh = SmallModule(small_net(7), lambda module: AdamW(module.parameters(), lr=1e-3))
    callback = qat(max_drop=-10.0)
    fit(trainer, fresh, callback, ckpt_path=tmp_path / "saved/last.ckpt", max_epochs=4)
    assert [rung.metric for rung in callback.result.rungs] == [rung.metric for rung in expected.result.rungs]
    assert_same_tensors(fresh.state_dict(), whole.state_dict())


def test_a_checkpoint_measured_by_another_metric(trainer: MakeTrainer, trained: SmallNet) -> None:
    first = qat("w8a8", max_drop=1.0)
    fit(trainer, module_of(trained), first)
    with pytest.raises(CheckpointError, match=r"monitor='val_loss', mode='min'.*given monitor='val_acc'"):
        fit(trainer, module_of(trained), qat("w8a8", max_drop=1.0, monitor="val_acc"), ckpt_path=first.best_model_path)


def test_promoted_layers_survive_checkpoint_and_export(trainer: MakeTrainer, trained: SmallNet, tmp_path: Path) -> None:
    module = module_of(trained)
    callback = qat("w4a16", max_drop=-10.0, rungs=("ptq", {"mixed": {"budget": 1.0}}))
    export = lq.DeviceExport(tmp_path / "export", name="net", samples=2)
    one = fit(trainer, module, callback, export)
    assert module.quantized.promoted
    one.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lq.load_quantized(SmallModule, tmp_path / "last.ckpt")
    assert loaded.quantized.promoted == module.quantized.promoted
    assert_same_tensors(loaded.state_dict(), module.state_dict())
    assert lq.read_manifest(tmp_path / "last.ckpt")["raised"]
    assert export.bundle is not None


def test_every_parameter_still_trains_after_the_rungs(trainer: MakeTrainer, trained: SmallNet) -> None:
    module = SmallModule(copy.deepcopy(trained), lambda m: SGD(m.parameters(), lr=1e-3))
    rungs = ("ptq", "tf_enhanced", "cle", "bn_reestimation", "seq_mse", {"mixed": {"budget": 1.0}})
    one = fit(trainer, module, qat(max_drop=-10.0, rungs=rungs), max_epochs=1)
    held = {id(parameter) for group in one.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters()}
    assert all(p.requires_grad == (name in module.quantized._learnable_ranges or "quantizer" not in name)
               for name, p in module.quantized.network.named_parameters())  # fmt: skip


def test_another_module_starts_from_nothing(trainer: MakeTrainer, trained: SmallNet) -> None:
    callback = qat("w8a8", max_drop=1.0)
    fit(trainer, module_of(trained), callback)
    first = callback.result
    other = small_net(5).eval()
    fit(trainer, module_of(other), callback)
    assert callback.result is not first
    assert callback.result.float_metric != first.float_metric
    assert [rung.rung for rung in callback.result.rungs] == ["ptq"]


def test_training_that_diverges_leaves_the_best_rung(trainer: MakeTrainer, trained: SmallNet) -> None:
    class Diverging(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    module, callback = Diverging(copy.deepcopy(trained)), qat(max_drop=-10.0)
    with pytest.warns(UserWarning, match=r"Step 1 \(epoch 0, batch 0\) has gradients that are not finite"):
        fit(trainer, module, callback)
    ptq, training = callback.result.rungs
    assert (training.metric, training.kept, training.reason) == (ptq.metric, False, "no better than ptq: rolled back")
    assert val_loss(trainer, module, callback) == ptq.metric


def test_what_is_measured_is_not_taken_for_a_validation_of_the_training(
    trainer: MakeTrainer, trained: SmallNet
) -> None:
    class Seen(Callback):
        metrics: dict[str, Any]

        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                self.metrics = dict(trainer.callback_metrics)

    seen = Seen()
    fit(trainer, module_of(trained), qat(max_drop=-10.0), seen, check_val_every_n_epoch=2)
    assert "train_loss" in seen.metrics
    assert "val_loss" not in seen.metrics


def test_resuming_a_finished_training_ends_with_the_best_too(
    trainer: MakeTrainer, trained: SmallNet, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True)
    bad = module_of(trained, learning_rate=1.0)
    first = qat(max_drop=-10.0)
    fit(trainer, bad, first, saving, enable_checkpointing=True)
    module, callback = module_of(small_net(7)), qat(max_drop=-10.0)
    fit(trainer, module, callback, ckpt_path=tmp_path / "last.ckpt")
    assert [rung.metric for rung in callback.result.rungs] == [rung.metric for rung in first.result.rungs]
    assert callback.result.best is not None
    assert val_loss(trainer, module, callback) == callback.result.best.metric


def test_a_second_fit_is_measured_again(trainer: MakeTrainer, trained: SmallNet) -> None:
    module, callback = module_of(trained), qat(max_drop=-10.0)
    fit(trainer, module, callback, max_epochs=1)
    module.called.clear()
    fit(trainer, module, callback, max_epochs=1, check_val_every_n_epoch=5)
    assert module.called.count("validation") == 4
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "qat"]


def test_a_failed_climb_without_training_does_not_keep_the_next_fit_from_training(
    trainer: MakeTrainer, trained: SmallNet
) -> None:
    callback = qat(max_drop=-10.0, monitor="val_miou")
    with pytest.raises(ConfigurationError, match="was not logged"):
        fit(trainer, module_of(trained), callback, max_epochs=0)
    callback.result.monitor = "val_loss"
    assert fit(trainer, module_of(trained), callback).global_step == 8


def test_validating_another_module_keeps_the_result(trainer: MakeTrainer, trained: SmallNet) -> None:
    callback = qat("w8a8", max_drop=1.0, calibration_dataloader=small_loader())
    fit(trainer, module_of(trained), callback)
    trainer(callback).validate(module_of(trained), small_loader(), verbose=False)
    assert [rung.rung for rung in callback.result.rungs] == ["ptq"]


@pytest.mark.parametrize("arguments", [{"max_steps": 0}, {"limit_train_batches": 0}])
def test_a_fit_that_lightning_would_skip_is_refused(
    trainer: MakeTrainer, trained: SmallNet, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="Use max_epochs=0 for rungs only"):
        fit(trainer, module_of(trained), qat(max_drop=0.1), **arguments)


def test_samples_that_can_be_read_once_only() -> None:
    with pytest.raises(ConfigurationError, match="calibration_dataloader is an iterator"):
        qat(max_drop=0.1, calibration_dataloader=iter(small_loader()))


def test_a_rung_that_fails_leaves_the_modes_as_they_were(
    trainer: MakeTrainer, trained: SmallNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(trained)
    module.train()
    monkeypatch.setattr(Shift, "fails", staticmethod(fail))
    with pytest.raises(RuntimeError, match="the power went out"):
        fit(trainer, module, qat(max_drop=-10.0, rungs=RUNGS))
    assert module.training
    assert module.model.training


def test_rungs_that_come_too_late_give_a_warning(trainer: MakeTrainer, trained: SmallNet) -> None:
    first = qat(max_drop=-10.0)
    fit(trainer, module_of(trained), first)
    with pytest.warns(UserWarning, match="The climb was over in the checkpoint: cle are not tried"):
        fit(trainer, module_of(trained), qat(max_drop=-10.0, rungs=("ptq", "cle")),
            ckpt_path=first.best_model_path, max_epochs=3)  # fmt: skip


# How it measures


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
