"""Folders of classes: what is read, what calibrates, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_quant.domains.classification.datamodule import ImageFolderDataModule, SyntheticShapesDataModule
from lightning_quant.domains.images import denormalize
from lightning_quant.errors import ConfigurationError, DataError
from tests.domains.classification.folders import COLORS, write_images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five, two and eight training images, and two of each color to validate with."""
    folder = write_images(tmp_path_factory.mktemp("colors"), "train", blue=5, green=2, red=8)
    return write_images(folder, "val", 2)


def read(loader: DataLoader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_images_are_normalized_and_labels_are_folders_in_order(root: Path) -> None:
    data = ImageFolderDataModule(str(root), size=16, batch_size=4)
    data.setup("fit")
    assert data.class_names == ("blue", "green", "red")
    images, labels = read(data.val_dataloader())
    assert (images.shape, images.dtype) == ((6, 3, 16, 16), torch.float32)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, label in zip(images, labels.tolist(), strict=True):
        assert denormalize(image).mean((0, 1)) == pytest.approx(COLORS[data.class_names[label]], abs=12)
    trained, labels = read(data.train_dataloader())
    assert trained.shape == (12, 3, 16, 16)  # three full batches of 15 images


def test_the_middle_of_the_resized_image_is_seen(tmp_path: Path) -> None:
    picture = Image.new("L", (200, 100))
    picture.paste(255, (50, 0, 150, 100))  # the middle square is white
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            picture.save(tmp_path / split / name / "1.png")
    images, _ = read(ImageFolderDataModule(str(tmp_path), size=32, crop_fraction=0.5).val_dataloader())
    assert (denormalize(images[0]) == 255).all()
    images, _ = read(ImageFolderDataModule(str(tmp_path), size=32, crop_fraction=1.0).val_dataloader())
    assert denormalize(images[0]).mean() > 240
    data = ImageFolderDataModule(str(tmp_path), size=32, batch_size=2, crop_scale=(0.1, 0.2))
    torch.manual_seed(0)
    varied = [read(data.train_dataloader())[0] for _ in range(3)]
    assert not torch.equal(varied[0], varied[1])
    plain = ImageFolderDataModule(str(tmp_path), size=32, batch_size=2, augment=False)
    assert torch.equal(read(plain.train_dataloader())[0], read(plain.calibration_dataloader())[0])


@pytest.mark.parametrize(("samples", "counts"), [(6, [2, 2, 2]), (10, [4, 2, 4]), (256, [5, 2, 8])])
def test_the_classes_take_turns_in_calibration(root: Path, samples: int, counts: list[int]) -> None:
    def calibration(**options: int) -> tuple[Tensor, Tensor]:
        return read(ImageFolderDataModule(str(root), size=16, batch_size=4, **options).calibration_dataloader())

    images, labels = calibration(calibration_samples=samples)
    assert [Counter(labels.tolist())[one] for one in range(3)] == counts
    assert torch.equal(images, calibration(calibration_samples=samples)[0])  # never augmented
    assert torch.equal(images[:3], calibration(calibration_samples=3)[0])
    assert not torch.equal(images, calibration(calibration_samples=samples, seed=1)[0])


def test_a_test_split_is_used_where_there_is_one(root: Path, tmp_path: Path) -> None:
    data = ImageFolderDataModule(str(root), size=16)
    assert len(read(data.test_dataloader())[1]) == 6
    for split, count in (("train", 1), ("val", 1), ("test", 3)):
        write_images(tmp_path, split, count)
    assert len(read(ImageFolderDataModule(str(tmp_path), size=16).predict_dataloader())[1]) == 9


def test_what_is_no_folder_of_classes_is_refused_in_setup(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere.train\. Expected a data set with train/<class>"):
        ImageFolderDataModule(str(tmp_path / "nowhere")).setup("fit")
    write_images(tmp_path, "train", 1)
    with pytest.raises(DataError, match=r"There is no folder .*val"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")
    write_images(tmp_path, "val", 1, red=0)
    with pytest.raises(DataError, match=r"val is no folder of classes: .*red.* Expected val/<class>/<image>"):
        ImageFolderDataModule(str(tmp_path)).setup("validate")
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train is no folder of classes"):
        ImageFolderDataModule(str(tmp_path / "empty")).setup("fit")


def test_splits_of_other_classes_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path, split, 1)
    (tmp_path / "val/red").rename(tmp_path / "val/rot")
    with pytest.raises(DataError, match=r"has other classes than .*missing are \['red'\], unknown are \['rot'\]"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, "train", 1)
    (tmp_path / "train/red/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"red.0\.png cannot be read as an image"):
        read(ImageFolderDataModule(str(tmp_path)).calibration_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"calibration_samples": 0}, "calibration_samples=0: expected at least 1"),
        ({"crop_fraction": 1.5}, r"crop_fraction=1\.5: expected a part of the image"),
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale=\(0\.5, 0\.2\): expected the least and the largest part"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ImageFolderDataModule("nowhere", **arguments)


def test_more_than_a_split_holds_is_no_batch(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size=16 with a training split of 15 images"):
        ImageFolderDataModule(str(root), batch_size=16).train_dataloader()


def test_shapes_are_drawn_once_and_are_the_same_everywhere(tmp_path: Path) -> None:
    options = {"train": 12, "val": 6, "size": 32}
    data = SyntheticShapesDataModule(str(tmp_path / "a"), **options)
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == ("circle", "cross", "ring", "square", "star", "triangle")
    assert Counter(read(data.val_dataloader())[1].tolist()) == Counter(range(6))
    (tmp_path / "a/train/ring/000002.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    data.prepare_data()
    assert len(list(tmp_path.rglob("train/*/*.png"))) == 12
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    SyntheticShapesDataModule(str(tmp_path / "b"), **options).prepare_data()
    files = [{path.name: path.read_bytes() for path in (tmp_path / one).rglob("*.png")} for one in "ab"]
    assert files[0] == files[1]
    with pytest.raises(DataError, match=r"holds images drawn with .*'val': 6.*'val': 7"):
        SyntheticShapesDataModule(str(tmp_path / "a"), **{**options, "val": 7}).prepare_data()
    with pytest.raises(ConfigurationError, match=r"val=3, size=32: expected train and val of 6 or more"):
        SyntheticShapesDataModule(str(tmp_path / "c"), **{**options, "val": 3}).prepare_data()
