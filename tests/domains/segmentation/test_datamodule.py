from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from PIL import Image
from torch import Tensor

from lightning_quant.domains.segmentation.datamodule import CityscapesDataModule, SyntheticScenesDataModule
from lightning_quant.domains.segmentation.scenes import generate_scenes
from lightning_quant.errors import ConfigurationError, DataError
from tests.domains.segmentation.pairs import write_pair
from tests.helpers.trainers import quiet_trainer


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten training and four validation scenes of 32x64."""
    return str(generate_scenes(tmp_path_factory.mktemp("scenes"), train=10, val=4, height=32, width=64))


def batches(loader: torch.utils.data.DataLoader) -> Tensor:
    """All images that a loader yields, in its order."""
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in loader])


class Sink(LightningModule):
    """Takes batches and remembers their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[tuple[int, ...]]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.seen["train"].append((*batch[0].shape, *batch[1].shape))
        return self.weight

    def validation_step(self, batch: list[Tensor]) -> None:
        self.seen["val"].append((*batch[0].shape, *batch[1].shape))

    def test_step(self, batch: list[Tensor]) -> None:
        self.seen["test"].append((*batch[0].shape, *batch[1].shape))

    def predict_step(self, batch: Tensor) -> None:
        self.seen["predict"].append(tuple(batch.shape))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_runs_every_stage(scenes: str, tmp_path: Path) -> None:
    data = CityscapesDataModule(scenes, batch_size=4)
    sink = Sink()
    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(sink, datamodule=data)
    trainer.test(sink, datamodule=data)
    trainer.predict(sink, datamodule=data)
    full = (4, 3, 32, 64, 4, 32, 64)
    assert sink.seen == {"train": [full, full], "val": [full], "test": [full], "predict": [full[:4]]}


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict", None])
def test_calibration_works_in_every_stage(scenes: str, stage: str | None) -> None:
    data = CityscapesDataModule(scenes, batch_size=4, calibration_samples=6)
    if stage:
        data.setup(stage)
    images, targets = next(iter(data.calibration_dataloader()))
    assert images.shape == (4, 3, 32, 64)
    assert (targets.shape, targets.dtype) == ((4, 32, 64), torch.int64)
    assert len(batches(data.calibration_dataloader())) == 6


def test_calibration_is_a_seeded_choice_of_plain_training_images(scenes: str) -> None:
    def calibration(**arguments: int) -> Tensor:
        return batches(CityscapesDataModule(scenes, **arguments).calibration_dataloader())

    chosen = calibration(calibration_samples=5)
    assert torch.equal(chosen, calibration(calibration_samples=5))
    assert torch.equal(chosen, calibration(calibration_samples=8)[:5])
    assert not torch.equal(chosen, calibration(calibration_samples=5, seed=1))
    everything = batches(CityscapesDataModule(scenes, augment=False, batch_size=10).train_dataloader())
    assert all(any(torch.equal(image, other) for other in everything) for image in chosen)
    assert len(calibration(calibration_samples=256)) == 10


def test_held_out_images_never_calibrate(scenes: str) -> None:
    data = CityscapesDataModule(scenes, held_out=3)
    calibrate, held = batches(data.calibration_dataloader()), batches(data.held_out_dataloader())
    assert (len(calibrate), len(held)) == (7, 3)
    assert not any(torch.equal(a, b) for a in calibrate for b in held)


def test_unlabeled_calibration_images_come_bare(scenes: str, tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (40, 20), (i, 0, 0)).save(tmp_path / f"{i}.jpg")
    data = CityscapesDataModule(
        scenes, size=(32, 64), batch_size=2, calibration_images=str(tmp_path), calibration_samples=3
    )
    data.setup("validate")
    assert [tuple(batch.shape) for batch in data.calibration_dataloader()] == [(2, 3, 32, 64), (1, 3, 32, 64)]


def test_a_pattern_selects_calibration_images(scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder in ("rgb", "ss"):
        (tmp_path / "urban" / folder).mkdir(parents=True)
        for i in (1, 2, 100):
            Image.new("RGB", (8, 8)).save(tmp_path / "urban" / folder / f"{folder}_{i:04d}.png")
    data = CityscapesDataModule(
        scenes, calibration_images=str(tmp_path / "urban"), calibration_pattern="rgb/*_00*.png", held_out=1
    )
    assert len(batches(data.calibration_dataloader())) == 1
    assert len(batches(data.held_out_dataloader())) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_follow_lightnings_seed(scenes: str, num_workers: int) -> None:
    def first_batches() -> Tensor:
        seed_everything(7, workers=True)
        data = CityscapesDataModule(scenes, batch_size=5, num_workers=num_workers)
        return batches(data.train_dataloader())

    once = first_batches()
    assert torch.equal(once, first_batches())
    # Augmented: none of them is a plain training image.
    plain = batches(CityscapesDataModule(scenes, augment=False, batch_size=10).train_dataloader())
    assert not any(torch.equal(a, b) for a in once for b in plain)


def test_testing_uses_labeled_test_images_only(scenes: str, tmp_path: Path) -> None:
    photo, road, void = (
        np.zeros((8, 8, 3), np.uint8),
        np.full((8, 8), 7, np.uint8),
        np.zeros((8, 8), np.uint8),
    )
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for i in range(count):
            write_pair(tmp_path, split, str(i), photo, void if split == "test" else road)
    data = CityscapesDataModule(str(tmp_path))
    assert len(batches(data.test_dataloader())) == 2  # the test labels are void, as the official ones
    assert len(batches(data.predict_dataloader())) == 1
    write_pair(tmp_path, "test", "0", photo, road)
    assert len(batches(data.test_dataloader())) == 1


def test_a_wrong_folder_is_reported_by_setup(tmp_path: Path) -> None:
    data = CityscapesDataModule(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="There is no folder"):
        data.setup("fit")


def test_a_batch_larger_than_the_training_split_is_refused(scenes: str) -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size=11 .* 10 images"):
        CityscapesDataModule(scenes, batch_size=11).train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"calibration_samples": 0}, "calibration_samples=0"),
        ({"held_out": -1}, "held_out=-1"),
        ({"size": (512,)}, r"size=\(512,\): expected \(height, width\)"),
        ({"size": (0, 8)}, r"size=\(0, 8\)"),
        ({"calibration_pattern": "rgb/*"}, "without calibration_images"),
    ],
)
def test_bad_arguments_are_refused_when_built(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CityscapesDataModule("anywhere", **arguments)


def test_synthetic_scenes_are_drawn_once(tmp_path: Path) -> None:
    data = SyntheticScenesDataModule(
        str(tmp_path / "scenes"), train=4, val=2, height=32, width=64, batch_size=2, calibration_samples=3
    )
    data.prepare_data()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    data.prepare_data()
    assert len(times) == 12
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    data.setup("fit")
    assert len(data.train_dataloader()) == 2
    assert batches(data.val_dataloader()).shape == (2, 3, 32, 64)
    assert len(batches(data.calibration_dataloader())) == 3


def test_real_photographs_in_worker_processes(camvid: Path) -> None:
    data = CityscapesDataModule(str(camvid), size=(96, 128), num_workers=2, calibration_samples=16)
    data.setup("fit")
    assert len(data.train_dataloader()) == 367 // 8
    images, targets = next(iter(data.val_dataloader()))
    assert images.shape == (8, 3, 96, 128)
    assert targets.shape == (8, 96, 128)
    assert len(batches(data.calibration_dataloader())) == 16
