"""Pictures and figures of classes that a user's own module brings: in the report and in the loggers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassRecall

import lightning_quant as lq
from lightning_quant.report.pictures import read_comparisons
from lightning_quant.report.record import RunRecord

MakeTrainer = Callable[..., Trainer]
FRUITS = ("apple", "pear", "plum")


class Fruits(LightningModule):
    """A classifier of three fruits that knows nothing of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(FRUITS))
        )
        self.recall = MulticlassRecall(len(FRUITS), average=None)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        scores = self.model(images)
        self.recall.update(scores, labels)
        self.log("val_mean", scores.mean())

    def on_validation_epoch_end(self) -> None:
        self.found = self.recall.compute().tolist()
        self.recall.reset()


class DrawnFruits(Fruits):
    """The same with a picture of its own, the name of the fruit on its photograph, and a table of its classes."""

    def draw_comparison(self, float_output: Tensor, quantized_output: Tensor, images: Tensor) -> lq.Comparison:
        photo = Image.fromarray((255 * images[0]).byte().permute(1, 2, 0).numpy())
        labels = [FRUITS[int(output.argmax())] for output in (float_output, quantized_output)]
        pictures = [photo.copy() for _ in labels]
        for label, picture in zip(labels, pictures, strict=True):
            ImageDraw.Draw(picture).text((0, 0), label)
        return lq.Comparison(*pictures, input=photo, legend={labels[0]: (255, 255, 255)})

    def class_figures(self) -> dict[str, dict[str, float]]:
        return {"recall": dict(zip(FRUITS, self.found, strict=True))}


class Images(LightningDataModule):
    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.rand(8, 3, 16, 32, generator=generator), torch.arange(8) % 3), 4)

    val_dataloader = train_dataloader


def validated(trainer: MakeTrainer, folder: Path, module: LightningModule, **options: Any) -> Path:
    """Quantize and export a module; the folder of its report."""
    export = lq.DeviceExport(folder, target=None, name="net")
    one = trainer(lq.PostTrainingQuantization(), export, **options)
    one.validate(module, datamodule=Images(), verbose=False)
    return folder / "net.report"


def test_a_module_of_the_users_own_is_drawn(trainer: MakeTrainer, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "tb", 0)
    module = DrawnFruits()
    folder = validated(trainer, tmp_path / "out", module, logger=logger)
    page = (folder / "report.html").read_text()
    assert page.count('class="comparison"') == 4
    assert "recall of each class" in page
    assert 'aria-label="Colors"' in page
    record = RunRecord.read(folder / "results.json")
    assert set(record.legend.values()) == {"#ffffff"}
    assert record.legend.keys() <= set(FRUITS)
    assert record.class_figures == {
        "ptq": {"recall": dict(zip(FRUITS, [round(value, 4) for value in module.found], strict=True))}
    }
    panels = read_comparisons(folder / "overlays")
    with Image.open(panels[0]["input"]) as photo, Image.open(panels[0]["float"]) as drawn:
        assert photo.size == drawn.size == (32, 16)
        assert photo.tobytes() != drawn.tobytes()
    (event_file,) = (tmp_path / "tb/version_0").glob("events*")
    images = EventAccumulator(str(event_file)).Reload().Tags()["images"]
    assert sorted(images) == sorted(["sensitivity", *(f"overlay/{index}" for index in range(4))])


def test_a_module_that_draws_nothing_has_no_pictures(trainer: MakeTrainer, tmp_path: Path) -> None:
    folder = validated(trainer, tmp_path, Fruits())
    page = (folder / "report.html").read_text()
    assert 'class="comparison"' not in page
    assert "of each class" not in page
    assert "W8A8 after PTQ; " in page  # of a metric nothing is known


def test_an_encoder_whose_calls_are_not_drawn(trainer: MakeTrainer, tmp_path: Path) -> None:
    class Undrawn(DrawnFruits):
        def draw_comparison(self, *_: Any) -> None:  # type: ignore[override]
            return None

    assert read_comparisons(validated(trainer, tmp_path, Undrawn()) / "overlays") == []


@pytest.mark.parametrize(
    ("drawn", "reason"), [(lambda *_: 1 / 0, "ZeroDivisionError: division by zero"), (lambda *_: {}, "returned dict")]
)
def test_a_report_is_not_lost_to_a_picture(
    trainer: MakeTrainer, tmp_path: Path, drawn: Callable[..., Any], reason: str
) -> None:
    class Broken(DrawnFruits):
        draw_comparison = drawn

    with pytest.warns(UserWarning, match=rf"Broken\.draw_comparison failed: .*{reason}.*no pictures"):
        folder = validated(trainer, tmp_path, Broken())
    assert "recall of each class" in (folder / "report.html").read_text()


def test_nor_to_a_table_of_classes(trainer: MakeTrainer, tmp_path: Path) -> None:
    class Broken(DrawnFruits):
        def class_figures(self) -> dict[str, dict[str, float]]:
            raise KeyError("plum")

    with pytest.warns(UserWarning, match=r"Broken\.class_figures failed: KeyError: 'plum'.*no classes"):
        folder = validated(trainer, tmp_path, Broken())
    assert (folder / "report.html").read_text().count('class="comparison"') == 4


def test_pictures_go_to_weights_and_biases_and_mlflow(
    trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its data base needs all of mlflow
    wandb = WandbLogger(save_dir=tmp_path, offline=True)
    mlflow = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns", artifact_location=str(tmp_path / "artifacts"))
    validated(trainer, tmp_path / "out", DrawnFruits(), logger=[wandb, mlflow])
    wandb.experiment.finish()
    kept = {path.name for path in (tmp_path / "artifacts").rglob("*.png")}
    assert kept == {"sensitivity.png", *(f"overlay_000{index}.png" for index in range(4))}
    names = [path.name for path in tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png")]
    assert sum(name.startswith("sensitivity") for name in names) == 1
    assert len(names) == 5
