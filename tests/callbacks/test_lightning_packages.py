"""Projects on ``lightning.pytorch`` and on ``pytorch_lightning``: the same callbacks, the same bits; and mixtures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.callbacks.lightning_packages import either, of_package
from lightning_quant.errors import ConfigurationError
from tests.helpers.small import SmallNet, small_loader, small_net

other = pytest.importorskip("pytorch_lightning", reason="needs the other package")

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [pytest.param(lightning.pytorch, id="lightning.pytorch"), pytest.param(other, id="pytorch_lightning")]
MIXED = [
    pytest.param(lightning.pytorch, other, id="pytorch_lightning-in-lightning.pytorch"),
    pytest.param(other, lightning.pytorch, id="lightning.pytorch-in-pytorch_lightning"),
]


def module_of(package: Any, **attributes: Any) -> Any:
    """A small classifier, a LightningModule of a package."""

    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model: nn.Module = small_net()
            for name, value in attributes.items():
                setattr(self, name, value)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores: Tensor = self.model(batch[0])
            return scores

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    return Module


def data_of(package: Any) -> Any:
    """A data module of a package."""

    class Data(package.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return small_loader(shuffle=True)

        def val_dataloader(self) -> Any:
            return small_loader()

        test_dataloader = predict_dataloader = val_dataloader

    return Data()


def trainer_of(package: Any, folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, **quiet, **arguments}
    return package.Trainer(default_root_dir=folder, callbacks=list(callbacks), **given)


def climbing() -> lq.QuantizationAwareTraining:
    """With a bound that no network is within, so that it climbs, and trains after it."""
    return lq.QuantizationAwareTraining(
        "w4a8", max_drop=-9.0, monitor="val_loss", mode="min", rungs=("ptq", "cle", "bias_correction"), distillation=0.1
    )


def fit(package: Any, folder: Path) -> tuple[Any, list[float | None], dict[str, float], bytes]:
    """A fit with everything that asks what an object is; the module, what was measured and the exported file."""
    lightning.pytorch.seed_everything(1)
    quantization, export = climbing(), lq.DeviceExport(str(folder / "export"), target="onnxruntime", monitor="val_loss")
    kept = package.callbacks.ModelCheckpoint(folder / "kept", monitor="val_loss", save_last=True)
    stop = package.callbacks.EarlyStopping("val_loss", patience=5)
    logger = package.loggers.CSVLogger(folder)
    callbacks = [quantization, export, stop, package.callbacks.LearningRateMonitor(), kept]
    trainer = trainer_of(package, folder, *callbacks, logger=logger, enable_checkpointing=True)
    module = module_of(package)()
    trainer.fit(module, datamodule=data_of(package))
    measured = [quantization.result.float_metric, *(rung.metric for rung in quantization.result.rungs)]
    assert stop.stopped_epoch == 0
    return module, measured, export.reports[0].metric, next((folder / "export").glob("*/*.onnx")).read_bytes()


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return {
        package: (folder := tmp_path_factory.mktemp("fit"), *fit(package, folder))
        for package in (lightning.pytorch, other)
    }


def test_a_fit_is_the_same_bit_for_bit(fits: dict[Any, Any]) -> None:
    (_, module, measured, metric, exported), (_, theirs, their_measured, their_metric, their_exported) = fits.values()
    assert isinstance(theirs, other.LightningModule)
    assert not isinstance(theirs, lightning.pytorch.LightningModule)
    assert measured == their_measured
    assert len(measured) == 5  # float, three rungs and training
    assert set(metric) == {"float", "simulation", "device"}
    assert metric == their_metric
    assert exported == their_exported
    for (name, value), their_value in zip(module.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, their_value), name


@pytest.mark.parametrize(
    ("package", "of_file"), [*((p.values[0], p.values[0]) for p in PACKAGES), *(p.values for p in MIXED)]
)
def test_a_checkpoint_of_either_is_loaded_by_either(fits: dict[Any, Any], package: Any, of_file: Any) -> None:
    folder, fitted = fits[of_file][:2]
    module = lq.load_quantized(module_of(package), folder / "kept/last.ckpt")
    assert isinstance(module, package.LightningModule)
    quantized = trainer_of(package, folder, quantization := lq.PostTrainingQuantization("w4a8"))
    quantized.validate(module, datamodule=data_of(package))
    assert quantization.quantized_network(module).calibrated
    assert set(module.state_dict()) == set(fitted.state_dict())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_stage_without_training(tmp_path: Path, package: Any) -> None:
    measured = []
    for stage in ("fit", "validate", "test"):
        module = module_of(package)()
        trainer = trainer_of(package, tmp_path, lq.PostTrainingQuantization("w4a8"))
        getattr(trainer, stage)(module, datamodule=data_of(package))
        measured.append(float(trainer.callback_metrics["val_loss"]))
        assert trainer.global_step == 0
    assert len(set(measured)) == 1
    module = module_of(package)()
    scores = trainer_of(package, tmp_path, lq.PostTrainingQuantization("w4a8")).predict(module, data_of(package))
    with torch.inference_mode():
        assert torch.equal(scores[0], module.model(next(iter(small_loader()))[0]))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_fit_is_resumed_with_the_same_bits(tmp_path: Path, package: Any) -> None:
    states = []
    for stops in (False, True):
        lightning.pytorch.seed_everything(1)
        point = lq.ResumePoint(tmp_path / f"{stops}" / "last.ckpt")
        for epochs in (1, 2) if stops else (2,):
            quantization = lq.QuantizationAwareTraining("w8a8", monitor="val_loss")
            trainer = trainer_of(package, tmp_path, point, quantization, max_epochs=epochs, enable_checkpointing=True)
            assert trainer.checkpoint_callbacks == [point]  # and no other by default
            module = module_of(package)()
            trainer.fit(module, datamodule=data_of(package), ckpt_path=point.ckpt_path, weights_only=True)
            if stops:
                torch.manual_seed(epochs)
        states.append({name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("package", PACKAGES)
def test_combined_loaders(tmp_path: Path, package: Any) -> None:
    class Combined(module_of(package)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["labeled"], batch_idx)  # type: ignore[no-any-return]

    module = Combined()
    combined = package.utilities.CombinedLoader({"labeled": small_loader()}, "min_size")
    trainer = trainer_of(package, tmp_path, quantization := lq.QuantizationAwareTraining("w8a8"), max_epochs=1)
    trainer.fit(module, combined)
    assert trainer.global_step == 4
    assert quantization.quantized_network(module).calibrated


@pytest.mark.parametrize("package", PACKAGES)
def test_sigterm_while_a_rung_reads_samples(tmp_path: Path, package: Any) -> None:
    read = []

    def samples() -> Any:
        read.append(1)
        yield from small_loader()
        if len(read) > 1:  # not at the calibration, before which Lightning has no handler
            os.kill(os.getpid(), signal.SIGTERM)
            yield from small_loader()

    quantization = climbing()
    quantization.calibration_dataloader = samples
    with pytest.raises(package.utilities.exceptions.SIGTERMException):
        trainer_of(package, tmp_path, quantization).fit(module_of(package)(), datamodule=data_of(package))


@pytest.mark.parametrize(("package", "theirs"), MIXED)
def test_callbacks_of_the_other_package(tmp_path: Path, package: Any, theirs: Any) -> None:
    """They neither stop nor save because of what the ladder measures, as those of the Trainer's own package."""
    kept = theirs.callbacks.ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=-1)
    stop = theirs.callbacks.EarlyStopping(
        "val_loss", patience=0, stopping_threshold=1e9, check_on_train_epoch_end=False
    )
    trainer = trainer_of(package, tmp_path, climbing(), stop, theirs.callbacks.LearningRateMonitor(), kept, logger=True)
    trainer.fit(module_of(package)(), datamodule=data_of(package))
    assert trainer.current_epoch == 1  # it stopped, after an epoch
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch=0-step=4.ckpt"]


@pytest.mark.parametrize(("package", "theirs"), MIXED)
def test_weights_averaged_by_the_other_package(tmp_path: Path, package: Any, theirs: Any) -> None:
    averaging = theirs.callbacks.StochasticWeightAveraging(1e-3)
    with pytest.raises(ConfigurationError, match="StochasticWeightAveraging is listed before"):
        trainer_of(package, tmp_path, averaging, lq.PostTrainingQuantization()).fit(
            module_of(package)(), datamodule=data_of(package)
        )


@pytest.mark.parametrize(("package", "theirs"), MIXED)
def test_a_data_module_of_the_other_package_is_refused(tmp_path: Path, package: Any, theirs: Any) -> None:
    module = module_of(package)()
    for callback in (
        lq.PostTrainingQuantization(),
        climbing(),
        lq.DeviceExport(),
        lq.ResumePoint(tmp_path / "last.ckpt"),
    ):
        trainer = trainer_of(package, tmp_path, callback, enable_checkpointing=True)
        with pytest.raises(ConfigurationError, match="Data is a LightningDataModule of") as error:
            trainer.fit(module, datamodule=data_of(theirs))
        assert "'lightning.pytorch'" in str(error.value)
        assert "'pytorch_lightning'" in str(error.value)
    assert type(module.model) is SmallNet


@pytest.mark.parametrize(("package", "theirs"), MIXED)
def test_lightning_itself_refuses_a_module_of_the_other_package(tmp_path: Path, package: Any, theirs: Any) -> None:
    """What docs/troubleshooting.md says: no callback is asked before."""
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        trainer_of(package, tmp_path, lq.PostTrainingQuantization()).fit(module_of(theirs)(), data_of(package))


@pytest.mark.parametrize(("package", "theirs"), MIXED)
def test_a_lightning_module_of_either_is_no_network(tmp_path: Path, package: Any, theirs: Any) -> None:
    module = module_of(package, inner=module_of(theirs)())()
    with pytest.raises(ConfigurationError, match=r"network='inner' is a LightningModule: .*'inner\.model'"):
        trainer_of(package, tmp_path, lq.PostTrainingQuantization(network="inner")).validate(
            module, datamodule=data_of(package)
        )


def test_loading_another_class_names_both_packages(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"SmallNet.*'lightning\.pytorch' or 'pytorch_lightning'"):
        lq.load_quantized(SmallNet, tmp_path / "any.ckpt")  # type: ignore[type-var]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_single_callback_needs_no_list(tmp_path: Path, package: Any) -> None:
    callback = lq.PostTrainingQuantization()
    assert callback in package.Trainer(callbacks=callback, logger=False, accelerator="cpu").callbacks


def test_the_short_import_is_the_same_package() -> None:
    assert lightning.Trainer is lightning.pytorch.Trainer
    assert issubclass(lightning.LightningModule, either(lightning.pytorch.LightningModule))


def test_things_are_found_in_the_package_of_an_object() -> None:
    assert of_package(module_of(other)(), lightning.pytorch.Trainer) is other.Trainer
    assert of_package(module_of(lightning.pytorch)(), lightning.pytorch.Trainer) is lightning.pytorch.Trainer
    assert of_package(object(), lightning.pytorch.Trainer) is lightning.pytorch.Trainer
    assert either(SmallNet) == (SmallNet,)


PROGRAM = """
from lightning_quant import DeviceExport  # before the package: it is recognized all the same
from lightning_utilities.core.rank_zero import log
import {package} as pl
from {package}.cli import LightningCLI
from tests.callbacks.test_lightning_packages import data_of, module_of

if __name__ == "__main__":
    assert log.name == "lightning.pytorch.utilities.rank_zero", log.name
    LightningCLI(module_of(pl), type(data_of(pl)), seed_everything_default=1)
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_the_command_line_of_either(tmp_path: Path, package: Any) -> None:
    quantization = {"precision": "w4a8", "max_drop": -9.0, "monitor": "val_loss", "mode": "min"}
    callbacks = [
        {"class_path": "lightning_quant.QuantizationAwareTraining", "init_args": quantization},
        {"class_path": "lightning_quant.DeviceExport", "init_args": {"target": "onnxruntime", "name": "net"}},
        {"class_path": "lightning_quant.ResumePoint", "init_args": {"path": "last.ckpt"}},
    ]
    trainer = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "callbacks": callbacks}
    (tmp_path / "program.py").write_text(PROGRAM.format(package=package.__name__))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    done = subprocess.run(
        [sys.executable, "program.py", "fit", "--config", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:.", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training ended: val_loss" in done.stdout + done.stderr
    assert (tmp_path / "last.ckpt").is_file()
    assert list(tmp_path.glob("lightning_logs/version_0/export/net/net.onnx"))
