"""Boxes from annotations in COCO's layout and from label maps, and the batches that are made of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_quant.domains.detection.datamodule import CocoDataModule, MaskBoxesDataModule, SceneBoxesDataModule
from lightning_quant.domains.detection.datasets import CocoBoxes, MaskBoxes, boxes_of_masks
from lightning_quant.errors import ConfigurationError, DataError

CAR, PERSON, SIGN = 26, 24, 20  # label ids; as train ids 13, 11, 7


def coco(folder: Path, **changes: Any) -> Path:
    """Two photographs, three categories with gaps between their ids, a crowd, a box beyond the edge."""
    content: dict[str, Any] = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 12, "name": "cow"}],
        "annotations": [
            {"image_id": 5, "category_id": 7, "bbox": [10, 20, 30, 10], "iscrowd": 0, "area": 300, "id": 1},
            {"image_id": 5, "category_id": 3, "bbox": [50, 30, 30, 20], "id": 2},
            {"image_id": 5, "category_id": 7, "bbox": [0, 0, 60, 40], "iscrowd": 1, "id": 3},
            {"image_id": 9, "category_id": 12, "bbox": [0, 0, 5, 5], "id": 4},
        ],
        **changes,
    }
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in ("a.png", "b.png"):
            Image.new("RGB", (60, 40), (90, 90, 90)).save(folder / split / name)
    (folder / "annotations").mkdir(exist_ok=True)
    for split in ("train2017", "val2017"):
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return folder


def opened(folder: Path, classes: list[str] | None = None) -> CocoBoxes:
    return CocoBoxes(folder / "val2017", folder / "annotations/instances_val2017.json", classes, (80, 120))


def test_coco_boxes_are_scaled_clipped_and_without_crowds(tmp_path: Path) -> None:
    data = opened(coco(tmp_path))
    assert data.class_names == ("dog", "cat", "cow")  # by their ids
    image, target = data[0]
    assert image.shape == (3, 80, 120)
    assert target["boxes"].tolist() == [[20, 40, 80, 60], [100, 60, 120, 80]]
    assert target["labels"].tolist() == [1, 0]
    _, chosen = opened(tmp_path, ["cat"])[0]
    assert (chosen["boxes"].tolist(), chosen["labels"].tolist()) == ([[20, 40, 80, 60]], [0])
    _, none = opened(tmp_path, ["cat"])[1]
    assert none["boxes"].shape == (0, 4)


def test_a_flip_takes_the_boxes_along(tmp_path: Path) -> None:
    coco(tmp_path)
    data = CocoBoxes(tmp_path / "val2017", tmp_path / "annotations/instances_val2017.json", ["cat"], None, augment=True)
    torch.manual_seed(0)
    seen = {tuple(data[0][1]["boxes"][0].tolist()) for _ in range(12)}
    assert seen == {(10, 20, 40, 30), (20, 20, 50, 30)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 5, "category_id": 7}]}, "is not laid out as COCO"),
        ({"annotations": [{"image_id": 77, "category_id": 7, "bbox": [1, 1, 2, 2]}]}, "is not laid out as COCO"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [1, 1, float("nan"), 2]}]}, "a bbox that is NaN"),
        ({"images": [{"id": 5, "file_name": "gone.png"}], "annotations": []}, "1 of 1 images"),
        ({"images": [], "annotations": []}, "lists no images"),
        ({"images": 3}, "is not laid out as COCO"),
    ],
)
def test_wrong_annotations_are_refused_before_any_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = CocoDataModule(str(coco(tmp_path, **change)))
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_missing_annotations_and_unknown_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instances_train2017\.json cannot be read"):
        CocoDataModule(str(tmp_path)).setup("fit")
    with pytest.raises(ConfigurationError, match="horse is no category"):
        CocoDataModule(str(coco(tmp_path)), classes=["cat", "horse"]).setup("validate")
    with pytest.raises(ConfigurationError, match="tram is no class of Cityscapes"):
        MaskBoxesDataModule(str(tmp_path), classes=["tram"]).setup("fit")
    with pytest.raises(DataError, match="There is no folder"):
        MaskBoxesDataModule(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(ConfigurationError, match="each once"):
        CocoDataModule(str(tmp_path), classes=["cat", "cat"])


def test_boxes_of_masks_are_those_of_connected_regions() -> None:
    train_ids = np.full((20, 30), 255, np.uint8)
    train_ids[2:6, 3:9] = 13
    train_ids[10:12, 10:12] = train_ids[12:14, 12:14] = 13  # they touch at a corner
    train_ids[15:18, 0:2] = 11
    train_ids[19, 29] = 13  # too small
    boxes, labels = boxes_of_masks(train_ids, ["person", "car"], min_area=4)
    assert boxes.tolist() == [[0, 15, 2, 18], [3, 2, 9, 6], [10, 10, 14, 14]]
    assert labels.tolist() == [0, 1, 1]


def test_instances_take_touching_things_apart_and_leave_groups_out(tmp_path: Path) -> None:
    label_ids = np.zeros((20, 30), np.uint8)
    label_ids[2:8, 2:14] = CAR
    label_ids[12:18, 2:8] = CAR
    label_ids[10:18, 20:28] = SIGN
    instances = label_ids.astype(np.uint16)
    instances[2:8, 2:8], instances[2:8, 8:14] = CAR * 1000, CAR * 1000 + 1
    for kind, name, array in (
        ("leftImg8bit", "leftImg8bit", np.zeros((20, 30, 3), np.uint8)),
        ("gtFine", "gtFine_labelIds", label_ids),
        ("gtFine", "gtFine_instanceIds", instances),
    ):
        path = tmp_path / kind / "val/town" / f"town_0_{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    boxes, labels = MaskBoxes(tmp_path, "val", ["car", "traffic sign"], min_area=4).annotations(0)
    assert boxes.tolist() == [[2, 2, 8, 8], [8, 2, 14, 8], [20, 10, 28, 18]]  # not the group at 12:18
    assert labels.tolist() == [0, 0, 1]
    path.unlink()
    boxes, _ = MaskBoxes(tmp_path, "val", ["car"], min_area=4).annotations(0)
    assert boxes.tolist() == [[2, 2, 14, 8], [2, 12, 8, 18]]


def test_batches_of_scenes(tmp_path: Path) -> None:
    data = SceneBoxesDataModule(str(tmp_path / "scenes"), train=5, val=2, batch_size=2, calibration_samples=3)
    data.prepare_data()
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 128, 256)
    assert [set(one) for one in targets] == [{"boxes", "labels"}] * 2
    for one in targets:
        assert (one["boxes"][:, 2:] > one["boxes"][:, :2]).all()
        assert (one["labels"] < 6).all()
    again, _ = data._labeled("train")[0]
    assert torch.equal(again, data._labeled("train")[0][0])
    assert sum(len(batch) for batch, _ in data.calibration_dataloader()) == 3
    assert next(iter(data.predict_dataloader())).shape == (2, 3, 128, 256)
    with pytest.raises(ConfigurationError, match="not one full batch"):
        SceneBoxesDataModule(str(tmp_path / "scenes"), train=5, val=2, batch_size=6).train_dataloader()
