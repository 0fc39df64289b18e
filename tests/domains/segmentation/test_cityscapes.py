from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lightning_quant.domains.images import IMAGE_MEAN, IMAGE_STD
from lightning_quant.domains.segmentation.cityscapes import (
    CLASS_NAMES,
    CLASSES,
    IGNORE_INDEX,
    NUM_CLASSES,
    PALETTE,
    CityscapesDataset,
    read_labels,
    to_train_ids,
)
from lightning_quant.errors import DataError
from tests.domains.segmentation.pairs import write_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pairs of 8x16: left half road in dark gray, right half sky in light blue."""
    photo = np.full((8, 16, 3), (60, 60, 60), np.uint8)
    photo[:, 8:] = (150, 180, 220)
    label_ids = np.full((8, 16), 7, np.uint8)
    label_ids[:, 8:] = 23
    for name in ("a", "b", "c"):
        write_pair(tmp_path, "train", name, photo, label_ids)
    return tmp_path


def test_the_classes_are_those_of_torchvision() -> None:
    reference = [c for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < 255]
    assert [tuple(c) for c in CLASSES] == [(c.name, c.id, c.train_id, c.color) for c in reference]
    assert len(CLASS_NAMES) == NUM_CLASSES == 19
    assert PALETTE.dtype == np.uint8
    assert PALETTE.tolist() == [list(c.color) for c in CLASSES]


def test_every_legal_label_id_gets_the_train_id_of_torchvision() -> None:
    for c in torchvision.datasets.Cityscapes.classes:
        expected = c.train_id if 0 <= c.train_id < 255 else IGNORE_INDEX
        assert to_train_ids(np.array([[c.id]])).tolist() == [[expected]], c.name
    assert to_train_ids(np.array([255], np.uint8)).tolist() == [IGNORE_INDEX]


@pytest.mark.parametrize("label_ids", [np.array([7, 34, 200], np.uint8), np.array([7, 26001, 34, -2], np.int32)])
def test_an_illegal_label_id_is_named_with_its_file(label_ids: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"x\.png holds label ids .*34.*instanceIds"):
        to_train_ids(label_ids, "x.png")


def test_an_item_is_normalized_and_holds_train_ids(root: Path) -> None:
    dataset = CityscapesDataset(root, "train")
    assert len(dataset) == 3
    assert dataset.size == (8, 16)
    image, target = dataset[0]
    assert (image.shape, image.dtype) == ((3, 8, 16), torch.float32)
    assert (target.shape, target.dtype) == ((8, 16), torch.int64)
    assert type(image) is type(target) is torch.Tensor
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    torch.testing.assert_close(image[:, 0, 0], (60 / 255 - mean) / std)
    torch.testing.assert_close(image[:, 0, 15], (torch.tensor([150.0, 180, 220]) / 255 - mean) / std)
    assert target[0].tolist() == [0] * 8 + [10] * 8


def test_resizing_blends_the_image_and_never_the_labels(root: Path) -> None:
    image, target = CityscapesDataset(root, "train", size=(6, 10))[0]
    assert image.shape == (3, 6, 10)
    assert target.shape == (6, 10)
    assert set(target.unique().tolist()) == {0, 10}
    assert len(image[0, 0].unique()) > 2  # antialiasing mixes the two colors at the edge


def test_augmentation_varies_items_and_keeps_image_and_labels_together(root: Path) -> None:
    dataset = CityscapesDataset(root, "train", augment=True)
    torch.manual_seed(0)
    items = [dataset[0] for _ in range(12)]
    assert all(i.shape == (3, 8, 16) and t.shape == (8, 16) for i, t in items)
    assert len({tuple(t.flatten().tolist()) for _, t in items}) > 3
    assert {t[0, 0].item() for _, t in items} == {0, 10}  # flipped or not
    for image, target in items:
        # Sky is bluer than red after any jitter, road is gray: the colors must be where the labels are.
        blue_over_red = (image[2] * IMAGE_STD[2] + IMAGE_MEAN[2]) - (image[0] * IMAGE_STD[0] + IMAGE_MEAN[0])
        inside = target == 10
        inside[:, 1:-1] &= (target[:, 2:] == 10) & (target[:, :-2] == 10)
        assert (blue_over_red[inside] > 0.02).all()
    torch.manual_seed(0)
    assert torch.equal(dataset[0][0], items[0][0])


def test_labels_without_an_image_are_left_aside(root: Path) -> None:
    next((root / "leftImg8bit").rglob("b_*")).unlink()
    assert [p.name[0] for p in CityscapesDataset(root, "train").images] == ["a", "c"]


def test_a_missing_root_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere.*leftImg8bit/<split>"):
        CityscapesDataset(tmp_path / "nowhere", "train")


def test_an_empty_root_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds nothing"):
        CityscapesDataset(tmp_path, "train")


def test_another_layout_is_reported_with_what_was_found(tmp_path: Path, root: Path) -> None:
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (other / "masks").mkdir()
    with pytest.raises(DataError, match="holds images/, masks/"):
        CityscapesDataset(other, "train")
    with pytest.raises(DataError, match=r"split 'val' .*leftImg8bit holds train/"):
        CityscapesDataset(root, "val")


def test_images_outside_a_city_folder_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "leftImg8bit" / "train"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "a_leftImg8bit.png")
    with pytest.raises(DataError, match=r"<city>.*train holds a_leftImg8bit\.png"):
        CityscapesDataset(tmp_path, "train")


def test_an_image_without_labels_is_named(root: Path) -> None:
    next((root / "gtFine").rglob("b_*")).unlink()
    with pytest.raises(DataError, match=r"1 of 3 images .*b_gtFine_labelIds\.png"):
        CityscapesDataset(root, "train")


def test_a_truncated_image_is_named_when_read(root: Path) -> None:
    dataset = CityscapesDataset(root, "train")
    dataset.images[1].write_bytes(dataset.images[1].read_bytes()[:60])
    with pytest.raises(DataError, match=r"b_leftImg8bit\.png cannot be read"):
        dataset[1]


def test_a_damaged_checksum_is_noticed(root: Path) -> None:
    dataset = CityscapesDataset(root, "train")
    data = bytearray(dataset.labels[1].read_bytes())
    data[-13] ^= 0xFF  # last byte of the pixels' checksum; the 12 bytes of the end marker follow it
    dataset.labels[1].write_bytes(data)
    with pytest.raises(DataError, match=r"b_gtFine_labelIds\.png cannot be read"):
        dataset[1]


def test_an_illegal_id_in_a_file_is_named_when_read(root: Path) -> None:
    dataset = CityscapesDataset(root, "train")
    Image.fromarray(np.full((8, 16), 77, np.uint8)).save(dataset.labels[2])
    with pytest.raises(DataError, match=r"c_gtFine_labelIds\.png holds label ids .*\[77\]"):
        dataset[2]


def test_colors_instead_of_label_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a_gtFine_labelIds.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(DataError, match=r"a_gtFine_labelIds\.png has 3 channels"):
        read_labels(path)


def test_labels_of_another_size_than_the_image_are_named(root: Path) -> None:
    write_pair(root, "train", "b", np.zeros((8, 16, 3), np.uint8), np.zeros((4, 8), np.uint8))
    with pytest.raises(DataError, match=r"b_leftImg8bit\.png is 8x16 .*are 4x8"):
        CityscapesDataset(root, "train", size=(8, 16))[1]


def test_images_of_different_sizes_need_a_size(root: Path) -> None:
    write_pair(root, "train", "b", np.zeros((4, 8, 3), np.uint8), np.zeros((4, 8), np.uint8))
    with pytest.raises(DataError, match=r"b_leftImg8bit\.png is 4x8 .*Pass size="):
        CityscapesDataset(root, "train")[1]
    assert CityscapesDataset(root, "train", size=(8, 16))[1][0].shape == (3, 8, 16)


def test_real_photographs_are_read(camvid: Path) -> None:
    dataset = CityscapesDataset(camvid, "val")
    assert (len(dataset), dataset.size) == (101, (192, 256))
    targets = torch.stack([dataset[i][1] for i in range(0, 101, 5)])
    assert set(targets.unique().tolist()) == {0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 13, 255}
    image, target = dataset[0]
    sky, road = image[:, target == 10].mean(), image[:, target == 0].mean()
    assert sky > road
