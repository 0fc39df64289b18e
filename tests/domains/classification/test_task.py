"""ClassificationTask: its figures against independent ones, its pictures, and a network quantized and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from lightning_quant.callbacks.visualizer import class_confusion
from lightning_quant.domains.classification.datamodule import ImageFolderDataModule
from lightning_quant.domains.classification.task import ClassificationTask
from lightning_quant.errors import ConfigurationError
from lightning_quant.report.record import RunRecord
from tests.domains.classification.folders import write_images
from tests.helpers.trainers import quiet_trainer


class Wrapped(nn.Module):
    """Returns the scores that it is given as another package would."""

    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.wrap = wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.factor * images.flatten(1))


def scored(count: int, classes: int) -> TensorDataset:
    """Images that are their own scores, right about half of the labels."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(count) % (classes - 1)  # the last class has no image
    scores = torch.randn(count, classes, generator=generator) + F.one_hot(labels, classes)
    return TensorDataset(scores.view(count, classes, 1, 1), labels)


def validated(folder: Path, data: TensorDataset, **arguments: Any) -> tuple[ClassificationTask, dict[str, float]]:
    task = ClassificationTask(Wrapped(), **arguments)
    (figures,) = quiet_trainer(folder).validate(task, DataLoader(data, batch_size=4), verbose=False)
    return task, dict(figures)


def test_accuracies_are_those_of_all_images(tmp_path: Path) -> None:
    data = scored(21, 7)  # the last batch is of one image
    scores, labels = data.tensors[0].flatten(1).numpy(), data.tensors[1].numpy()
    order = np.argsort(-scores, axis=1)
    task, figures = validated(tmp_path, data, num_classes=7)
    assert figures["val_acc"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert figures["val_acc5"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(axis=1)))
    assert 0 < figures["val_acc"] < figures["val_acc5"] < 1
    loss = F.cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels))
    assert figures["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    (tested,) = quiet_trainer(tmp_path).test(task, DataLoader(data, batch_size=4), verbose=False)
    assert tested["test_acc"] == figures["val_acc"]


def test_figures_of_classes_are_those_of_the_last_validation(tmp_path: Path) -> None:
    data = scored(21, 4)
    predicted, labels = data.tensors[0].flatten(1).argmax(1).numpy(), data.tensors[1].numpy()
    fresh = ClassificationTask(Wrapped(), num_classes=4)
    assert fresh.class_figures() == {}
    assert fresh.class_confusion() is None
    task, figures = validated(tmp_path, data, num_classes=4)
    assert set(figures) == {"val_loss", "val_acc"}  # of four classes every one is among the first five
    quiet_trainer(tmp_path).test(task, DataLoader(scored(8, 4), batch_size=4), verbose=False)  # is no validation
    found = task.class_figures()
    for index in range(3):
        hits = ((predicted == index) & (labels == index)).sum()
        assert found["recall"][f"class {index}"] == pytest.approx(hits / (labels == index).sum())
        assert found["precision"][f"class {index}"] == pytest.approx(hits / (predicted == index).sum())
    assert np.isnan(found["recall"]["class 3"])
    names, counts = task.class_confusion() or ((), None)
    assert names == ("class 0", "class 1", "class 2", "class 3")
    expected = [[((labels == row) & (predicted == column)).sum() for column in range(4)] for row in range(4)]
    assert np.array_equal(counts, expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: (logits, torch.zeros(1)),
        lambda logits: {"loss": torch.zeros(1), "logits": logits},
        lambda logits: {"aux": torch.zeros(1), "out": logits},
    ],
)
def test_logits_are_found_in_what_the_network_returns(wrap: Any) -> None:
    images = scored(4, 6).tensors[0]
    task = ClassificationTask(Wrapped(wrap), num_classes=6)
    assert torch.equal(task(images), images.flatten(1))
    assert torch.equal(task.predict_step([images, torch.zeros(4)], 0), images.flatten(1).argmax(1))
    assert torch.equal(task.predict_step(images, 0), images.flatten(1).argmax(1))


def test_smoothing_is_of_the_training_loss_only(tmp_path: Path) -> None:
    data = scored(8, 6)
    smooth = ClassificationTask(Wrapped(), num_classes=6, label_smoothing=0.2)
    expected = F.cross_entropy(data.tensors[0].flatten(1), data.tensors[1], label_smoothing=0.2)
    run = quiet_trainer(tmp_path, max_steps=1)
    run.fit(smooth, DataLoader(data, batch_size=8))
    assert run.callback_metrics["train_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses = [validated(tmp_path, data, num_classes=6, label_smoothing=share)[1] for share in (0.0, 0.2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (2, 7, 1, 1)])
def test_another_number_of_classes_than_the_network_has_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=rf"returned shape \(2, {shape[1]}\); expected \(N, 6\)\. Build it"):
        ClassificationTask(Wrapped(), num_classes=6)(torch.zeros(shape))


def test_another_number_of_classes_than_the_data_has_is_refused_before_any_step(tmp_path: Path) -> None:
    write_images(tmp_path, "train", 1)
    write_images(tmp_path, "val", 1)
    task = ClassificationTask(Wrapped(), num_classes=6)
    with pytest.raises(ConfigurationError, match=r"The data has 3 classes \(blue, green, red\).*Pass num_classes=3"):
        quiet_trainer(tmp_path).validate(task, datamodule=ImageFolderDataModule(str(tmp_path)), verbose=False)
    assert task.class_confusion() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1: expected at least 2"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: expected more than 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0: expected 0 to below 1"),
        ({"warmup_fraction": -0.1}, r"warmup_fraction=-0\.1: expected 0 to below 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClassificationTask(Wrapped(), **arguments)


def test_pictures_show_both_lists_where_they_differ() -> None:
    task = ClassificationTask(Wrapped(), num_classes=3)
    image = torch.zeros(1, 3, 32, 48)
    scores = torch.tensor([[3.0, 1.0, 0.0]])
    same, other = (task.draw_comparison(scores, one, image).panels() for one in (scores, scores.flip(1)))
    width, height = same["float"].size
    strip = (0, round(32 * width / 48), width, height)
    left, right = (0, 0, width // 2, height), (width // 2, 0, width, height)
    lists = {name: np.asarray(picture.crop(strip)) for name, picture in same.items()}
    for name, half in (("float", slice(None, width // 2)), ("quantized", slice(width // 2, None))):
        written = (lists[name] != 255).any(axis=2)
        assert written[:, half].mean() > 0.1
        assert written.sum() == written[:, half].sum()  # the other half is the other network's
    assert (lists["input"] == 255).all()
    assert same["float"].tobytes() == other["float"].tobytes()
    assert same["quantized"].crop(right).tobytes() != other["quantized"].crop(right).tobytes()
    assert same["quantized"].crop(left).tobytes() == other["quantized"].crop(left).tobytes()
    reddish = np.asarray(other["difference"]).astype(int) @ [1, -1, 0] > 100
    assert reddish.any()  # another class
    assert not (np.asarray(same["difference"]).astype(int) @ [1, -1, 0] > 100).any()


def test_more_classes_than_a_report_can_show_have_no_matrix(tmp_path: Path) -> None:
    task, _ = validated(tmp_path, scored(8, 201), num_classes=201)
    assert task.class_confusion() is None
    assert len(task.class_figures()["recall"]) == 201


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


class Own(LightningModule):
    """A module of the user's own with a matrix that is made somewhere."""

    def __init__(self, network: nn.Module, counts: Any) -> None:
        super().__init__()
        self.model, self.counts = network, counts

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", self.model(batch[0]).mean())

    def class_confusion(self) -> Any:
        return self.counts


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> ImageFolderDataModule:
    root = write_images(tmp_path_factory.mktemp("colors"), "train", 12)
    return ImageFolderDataModule(
        str(write_images(root, "val", 4)), size=16, batch_size=4, calibration_samples=12, crop_scale=(0.5, 1.0)
    )


def exported(folder: Path, module: LightningModule, data: ImageFolderDataModule) -> tuple[Trainer, Path]:
    """Quantize and export a module; its Trainer, and the folder of its report."""
    export = lq.DeviceExport(folder, target=None, name="net")
    trainer = quiet_trainer(folder, lq.PostTrainingQuantization(), export)
    trainer.validate(module, datamodule=data, verbose=False)
    return trainer, folder / "net.report"


def test_it_learns_and_its_export_has_names_pictures_and_a_matrix(
    tmp_path: Path, colors: ImageFolderDataModule
) -> None:
    task = ClassificationTask(small(), learning_rate=0.05, num_classes=3)
    quiet_trainer(tmp_path, max_epochs=6).fit(task, datamodule=colors)
    trainer, folder = exported(tmp_path / "out", task, colors)
    assert trainer.callback_metrics["val_acc"] > 0.9
    record = RunRecord.read(folder / "results.json")
    names, counts = task.class_confusion() or ((), torch.empty(0))
    assert record.confusion["ptq"].classes == names == ("blue", "green", "red")
    assert np.array_equal(record.confusion["ptq"].counts, counts)
    assert counts.sum() == 12
    assert set(record.class_figures["ptq"]) == {"recall", "precision"}
    page = (folder / "report.html").read_text()
    assert "Confusion of classes" in page
    assert page.count('class="comparison"') == 4
    assert '"blue"' in (tmp_path / "out/net/io.json").read_text()


def test_a_module_of_the_users_own_has_its_matrix_in_the_report(tmp_path: Path, colors: ImageFolderDataModule) -> None:
    counts = (["left", "right"], [[5, 1], [0, 3.0]])
    _, folder = exported(tmp_path, Own(small(), counts), colors)
    assert RunRecord.read(folder / "results.json").confusion["ptq"].to_json() == {
        "left": {"left": 5, "right": 1},
        "right": {"right": 3},
    }
    assert "Confusion of classes" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((["a", "b"], [[1, 2]]), "the shape of the counts"),
        ((["a", "b"], torch.tensor([[1.0, 0.5], [0, 1]])), "expected a whole number"),
        ((["a", "a"], torch.eye(2)), "names that are all different"),
        ((range(201), torch.eye(201)), "the number of classes is 201, expected 2 to 200"),
        (3, "TypeError"),
    ],
)
def test_a_report_is_not_lost_to_a_matrix(counts: Any, reason: str) -> None:
    with pytest.warns(UserWarning, match=rf"Own\.class_confusion failed: .*{reason}.*no confusion matrix"):
        assert class_confusion(Own(small(), counts)) is None
    assert class_confusion(Own(small(), None)) is None
