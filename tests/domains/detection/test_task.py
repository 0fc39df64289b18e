"""DetectionTask: its figures worked out by hand, a detector that learns, its quantization and its export."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_quant as lq
from lightning_quant.domains.detection.boxes import Boxes, Detections
from lightning_quant.domains.detection.datasets import collate
from lightning_quant.domains.detection.drawing import colors_of
from lightning_quant.domains.detection.network import Detector, fcos_nano
from lightning_quant.domains.detection.task import DetectionTask
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.pictures import Comparison
from tests.helpers.trainers import quiet_trainer

NAMES = ("square", "bar")


def shapes(count: int, seed: int = 0) -> list[tuple[Tensor, Boxes]]:
    """Noise with one bright square and one bright bar of another color in each image."""
    random = np.random.default_rng(seed)
    samples: list[tuple[Tensor, Boxes]] = []
    for _ in range(count):
        image = torch.from_numpy(0.3 * random.standard_normal((3, 64, 96), dtype=np.float32))
        boxes = []
        for channel, (height, width), left in ((0, (20, 20), 0), (2, (10, 30), 48)):
            x, y = left + random.integers(0, 48 - width), random.integers(0, 64 - height)
            image[channel, y : y + height, x : x + width] += 2
            boxes.append([x, y, x + width, y + height])
        samples.append((image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor([0, 1])}))
    return samples


def loader(count: int, batch: int = 8, seed: int = 0, shuffle: bool = False) -> DataLoader:
    return DataLoader(shapes(count, seed), batch_size=batch, collate_fn=collate, shuffle=shuffle)  # type: ignore[arg-type]


class Fixed(nn.Module):
    """Detects one box of class 0 in each image, at the position in the second row and third column."""

    def __init__(self, distances: list[float]) -> None:
        super().__init__()
        self.distances = distances

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.full((len(images), 2, 8, 12), -10.0)
        distances = torch.zeros(len(images), 4, 8, 12)
        scores[:, 0, 1, 2] = 3.0
        distances[:, :, 1, 2] = torch.tensor(self.distances)
        return scores, distances


def test_average_precision_by_hand(tmp_path: Path) -> None:
    # The box (12, 4, 28, 20) in both images. It is one's own; the other's is 16 wide and 22 high: their IoU is 0.73.
    own = {"boxes": torch.tensor([[12.0, 4.0, 28.0, 20.0]]), "labels": torch.tensor([0])}
    other = {"boxes": torch.tensor([[12.0, 4.0, 28.0, 26.0]]), "labels": torch.tensor([0])}
    batch = (torch.zeros(2, 3, 64, 96), [own, other])
    task = DetectionTask(Fixed([1.0, 1.0, 1.0, 1.0]), NAMES)
    (figures,) = quiet_trainer(tmp_path).validate(task, DataLoader([batch], batch_size=None), verbose=False)
    assert figures["val_map50"] == pytest.approx(1)
    # both are found at the five thresholds to 0.7, at the other five one of two, first: 51 of 101 recalls
    assert figures["val_map"] == pytest.approx((5 + 5 * 51 / 101) / 10, abs=1e-4)
    assert task.class_figures() == {"AP": {"square": pytest.approx(figures["val_map"])}}  # no bar was labeled

    again = quiet_trainer(tmp_path).validate(task, DataLoader([batch], batch_size=None), verbose=False)
    assert again == [figures]  # each epoch starts from nothing
    empty = (torch.zeros(1, 3, 64, 96), [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}])
    (none,) = quiet_trainer(tmp_path).test(task, DataLoader([empty], batch_size=None), verbose=False)
    assert np.isnan(none["test_map"])


def test_it_learns_and_stays_itself_when_quantized_and_exported(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    task = DetectionTask(Detector(2, widths=(8, 8, 16, 16, 16), neck=16), NAMES, learning_rate=1e-2)
    run = quiet_trainer(tmp_path, max_epochs=10, gradient_clip_val=1.0, limit_val_batches=0)
    run.fit(task, loader(48, batch=4, seed=1, shuffle=True))
    val = loader(16)
    (in_float,) = quiet_trainer(tmp_path).validate(task, val, verbose=False)
    assert in_float["val_map50"] > 0.6

    images = next(iter(val))[0]
    with torch.no_grad():
        expected = task.eval().model(images[:1])
    quantization = lq.PostTrainingQuantization(
        "w8a8", calibration_samples=16, calibration_dataloader=loader(16, seed=1)
    )
    export = lq.DeviceExport(tmp_path, name="shapes", target="onnxruntime", monitor="val_map50", report=False)
    (figures,) = quiet_trainer(tmp_path, quantization, export).validate(task, val, verbose=False)
    assert figures["val_map50"] > in_float["val_map50"] - 0.1
    assert figures["val_map50"] != in_float["val_map50"] or figures["val_map"] != in_float["val_map"]
    assert quantization.quantized_network(task).findings == []  # the NPU takes all of it
    with torch.no_grad():
        quantized = task.model(images[:1])
    (report,) = export.reports
    assert report.metric.keys() == {"float", "simulation", "device"}
    options = onnxruntime.SessionOptions()  # every operation as it is written
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "shapes/shapes.onnx", options)
    answers = session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})
    for answer, value in zip(answers, quantized.values(), strict=True):
        np.testing.assert_allclose(answer, value.numpy(), atol=0.1)

    drawn = task.draw_comparison(expected, quantized, images[:1])
    assert isinstance(drawn, Comparison)
    assert set(drawn.legend) == set(NAMES)
    pixels = np.asarray(drawn.panels()["quantized"]).reshape(-1, 3)
    for color in colors_of(2):
        assert (pixels == color).all(axis=1).sum() > 200
    assert not np.array_equal(np.asarray(drawn.panels()["quantized"]), np.asarray(drawn.panels()["input"]))
    assert task.class_names == NAMES
    assert len(task.class_colors) == 2


def test_predictions_are_boxes_of_images_with_and_without_labels(tmp_path: Path) -> None:
    task = DetectionTask(Fixed([1.0, 1.0, 1.0, 1.0]), NAMES)
    for data in (loader(3), DataLoader(torch.zeros(3, 3, 64, 96), batch_size=8)):
        (found,) = quiet_trainer(tmp_path).predict(task, data)
        assert [set(one) for one in found] == [set(Detections.__annotations__) | set(Boxes.__annotations__)] * 3
        assert found[0]["boxes"].tolist() == [[12, 4, 28, 20]]


def test_a_checkpoint_knows_its_arguments(tmp_path: Path) -> None:
    run = quiet_trainer(tmp_path, max_epochs=1)
    run.fit(DetectionTask(fcos_nano(2), NAMES, drawn_score=0.7), loader(8), loader(2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = DetectionTask.load_from_checkpoint(tmp_path / "last.ckpt", network=fcos_nano(2))
    assert (again.class_names, again.drawn_score) == (NAMES, 0.7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"class_names": []}, "class_names"),
        ({"class_names": None}, "class_names"),
        ({"class_names": "car"}, "class_names"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"iou_threshold": -1}, "iou_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"warmup_fraction": 1}, "warmup_fraction"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DetectionTask(fcos_nano(2), **{"class_names": NAMES, **wrong})


def test_images_of_another_size_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"Images of 64x100 .* multiples of 32"):
        DetectionTask(fcos_nano(2), NAMES)(torch.zeros(1, 3, 64, 100))
    with pytest.raises(ConfigurationError, match="has nothing to report yet"):
        DetectionTask(fcos_nano(2), NAMES).class_figures()
    with pytest.raises(ConfigurationError, match="num_classes=0"):
        fcos_nano(0)


def test_without_what_computes_average_precision_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-quant\[detection\]'"):
        DetectionTask(fcos_nano(2), NAMES)
