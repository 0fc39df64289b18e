"""SegmentationTask: its figures against independent ones, and real training of small networks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from lightning_quant.domains.optimization import cosine_with_warmup
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.task import SegmentationTask, class_iou, first_tensor
from lightning_quant.errors import ConfigurationError
from tests.helpers.processes import run_two_ranks
from tests.helpers.trainers import quiet_trainer


def colored(count: int, classes: int = 4, size: tuple[int, int] = (16, 24)) -> TensorDataset:
    """Blocky label maps, 255 in a corner, and images that show channel 0..2 (or none) where the class is."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.randint(0, classes, (count, 1, size[0] // 8, size[1] // 8), generator=generator)
    targets = F.interpolate(coarse.float(), size=size)[:, 0].long()
    images = F.one_hot(targets, classes).movedim(-1, 1)[:, :3].float()
    targets[:, :3, :5] = 255
    return TensorDataset(images + 0.2 * torch.randn(images.shape, generator=generator), targets)


def numpy_miou(predictions: Sequence[NDArray], targets: Sequence[NDArray], classes: int = 4) -> float:
    """Sets of pixels over all images, without a confusion matrix."""
    predicted = np.concatenate([p.ravel() for p in predictions])
    labels = np.concatenate([t.ravel() for t in targets])
    predicted, labels = predicted[labels != 255], labels[labels != 255]
    ious = []
    for c in range(classes):
        here, there = labels == c, predicted == c
        if here.any():
            ious.append((here & there).sum() / (here | there).sum())
    return float(np.mean(ious))


def small(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, classes, 1))


def seeing() -> nn.Module:
    """Tells the classes of :func:`colored` apart, with errors, without training."""
    network = nn.Conv2d(3, 4, 1)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.4])
    network.load_state_dict({"weight": torch.eye(4, 3).view(4, 3, 1, 1), "bias": bias})
    return network


def class_maps(task: SegmentationTask, data: TensorDataset) -> list[NDArray]:
    with torch.no_grad():
        logits = task.model.eval()(data.tensors[0])
        logits = F.interpolate(logits, size=data.tensors[1].shape[-2:], mode="bilinear")
    return list(logits.argmax(1).numpy())


@pytest.mark.parametrize("stage", ["val", "test"])
def test_miou_is_accumulated_over_uneven_batches(tmp_path: Path, stage: str) -> None:
    data = colored(7)
    data.tensors[1][6] = torch.where(data.tensors[1][6] == 255, 255, 3)
    task = SegmentationTask(small(), num_classes=4)
    run = quiet_trainer(tmp_path)
    evaluate = run.validate if stage == "val" else run.test
    (figures,) = evaluate(task, DataLoader(data, batch_size=3), verbose=False)

    maps, targets = class_maps(task, data), list(data.tensors[1].numpy())
    assert figures[f"{stage}_miou"] == pytest.approx(numpy_miou(maps, targets), abs=1e-6)
    by_batch = [numpy_miou(maps[i : i + 3], targets[i : i + 3]) for i in (0, 3, 6)]
    assert figures[f"{stage}_miou"] != pytest.approx(np.mean(by_batch), abs=1e-3)

    logits = F.interpolate(task.model(data.tensors[0]), size=(16, 24), mode="bilinear")
    losses = [F.cross_entropy(logits[i : i + 3], data.tensors[1][i : i + 3], ignore_index=255) for i in (0, 3, 6)]
    weighted = (3 * losses[0] + 3 * losses[1] + losses[2]) / 7
    assert figures[f"{stage}_loss"] == pytest.approx(weighted.item(), rel=1e-5)

    per_class = task.per_class_iou(stage)
    assert list(per_class) == ["class 0", "class 1", "class 2", "class 3"]
    assert np.mean(list(per_class.values())) == pytest.approx(figures[f"{stage}_miou"], abs=1e-6)


def test_each_epoch_starts_from_nothing(tmp_path: Path) -> None:
    task = SegmentationTask(small(), num_classes=4)
    run = quiet_trainer(tmp_path)
    first = run.validate(task, DataLoader(colored(5), batch_size=2), verbose=False)
    run.validate(task, DataLoader(colored(6), batch_size=2), verbose=False)
    assert run.validate(task, DataLoader(colored(5), batch_size=2), verbose=False) == first


# Started as a script: a process that was spawned has died at its end now and then, inside PyTorch.
DDP_SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader
from lightning_quant.domains.segmentation.task import SegmentationTask
from tests.domains.segmentation.test_task import one_sees_less, seeing
from tests.helpers.trainers import quiet_trainer

(out,) = sys.argv[1:]
run = quiet_trainer(out, devices=2, strategy="ddp")
(figures,) = run.validate(
    SegmentationTask(seeing(), num_classes=4), DataLoader(one_sees_less(), batch_size=2), verbose=False
)
torch.save(figures, f"{out}/rank{run.global_rank}.pt")
run.strategy.barrier()  # the first is not to end before the second has saved
"""


def one_sees_less() -> TensorDataset:
    data = colored(6)
    data.tensors[1][::2] = data.tensors[1][::2].clamp(min=255)  # the first process sees one image only,
    data.tensors[1][0, 8:] = 1  # and of that the half, all of one class
    return data


@pytest.mark.slow
def test_miou_sums_the_processes_of_ddp(tmp_path: Path) -> None:
    data = one_sees_less()
    task = SegmentationTask(seeing(), num_classes=4)
    maps, targets = class_maps(task, data), list(data.tensors[1].numpy())
    by_process = [numpy_miou(maps[i::2], targets[i::2]) for i in (0, 1)]
    for figures in run_two_ranks(tmp_path, DDP_SCRIPT, str(tmp_path)):
        assert figures["val_miou"] == pytest.approx(numpy_miou(maps, targets), abs=1e-6)
        assert figures["val_miou"] != pytest.approx(np.mean(by_process), abs=1e-2)


def test_class_without_labels_has_no_place_in_the_mean() -> None:
    # Class 2 is predicted once but labeled nowhere: it costs class 0 a pixel and has no IoU of its own.
    iou = class_iou(torch.tensor([[3, 1, 1], [0, 4, 0], [0, 0, 0]]))
    torch.testing.assert_close(iou, torch.tensor([3 / 5, 4 / 5, torch.nan]), equal_nan=True)


def test_learns(tmp_path: Path) -> None:
    task = SegmentationTask(small(), learning_rate=0.05, num_classes=4)
    run = quiet_trainer(tmp_path, max_epochs=6)
    before = run.validate(task, DataLoader(colored(9), batch_size=4), verbose=False)[0]
    run.fit(task, DataLoader(colored(40), batch_size=4, shuffle=True))
    after = run.validate(task, DataLoader(colored(9), batch_size=4), verbose=False)[0]
    assert before["val_miou"] < 0.4
    assert after["val_miou"] > 0.8
    assert after["val_loss"] < 0.5 * before["val_loss"]
    assert run.callback_metrics["val_miou"] == after["val_miou"]


def test_train_loss_is_logged(tmp_path: Path) -> None:
    run = quiet_trainer(tmp_path, max_steps=1)
    run.fit(SegmentationTask(small(), num_classes=4), DataLoader(colored(4), batch_size=4))
    assert run.callback_metrics["train_loss"].isfinite()


class LearningRates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_learning_rate_climbs_and_falls_over_all_steps(tmp_path: Path) -> None:
    rates = LearningRates()
    task = SegmentationTask(small(), learning_rate=0.1, num_classes=4, warmup_fraction=0.25)
    run = quiet_trainer(tmp_path, rates, max_epochs=2, accumulate_grad_batches=2)
    run.fit(task, DataLoader(colored(40), batch_size=2))
    # 40 batches, 20 optimizer steps, of which 5 warm up; two batches see the same rate.
    assert run.global_step == 20
    expected = [0.1 * cosine_with_warmup(step, 20, 5) for step in range(20) for _ in range(2)]
    assert rates.seen == pytest.approx(expected)
    assert np.argmax(rates.seen) == 10


def test_without_an_end_the_learning_rate_is_constant(tmp_path: Path) -> None:
    rates = LearningRates()
    run = quiet_trainer(tmp_path, rates, max_epochs=-1, max_time={"seconds": 1})
    run.fit(SegmentationTask(small(), learning_rate=0.1, num_classes=4), DataLoader(colored(8), batch_size=4))
    assert set(rates.seen) == {0.1}


def test_class_weights_and_void_in_the_loss() -> None:
    weights = [0.5, 2.0, 1.0, 3.0]
    images, targets = colored(3).tensors
    plain, weighted = (SegmentationTask(small(), num_classes=4, class_weights=w) for w in (None, weights))
    for task, expected in ((plain, None), (weighted, torch.tensor(weights))):
        loss = task._loss(task(images), targets)
        torch.testing.assert_close(loss, F.cross_entropy(task(images), targets, expected, ignore_index=255))
        void = task._loss(task(images), torch.full_like(targets, 255))
        void.backward()
        assert void == 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())


def test_reloads_with_the_network_handed_over_again(tmp_path: Path) -> None:
    weights = [1.0, 2.0, 3.0, 4.0]
    task = SegmentationTask(small(), learning_rate=0.02, num_classes=4, class_weights=weights)
    run = quiet_trainer(tmp_path, max_steps=2)
    run.fit(task, DataLoader(colored(4), batch_size=2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("model.") for key in state)

    torch.manual_seed(5)
    again = SegmentationTask.load_from_checkpoint(
        tmp_path / "last.ckpt", network=nn.Sequential(*small().children()), weights_only=True
    )
    assert again.hparams == {**task.hparams, "class_weights": weights}
    assert again.learning_rate == 0.02
    assert torch.equal(again.get_buffer("class_weights"), torch.tensor(weights))
    images = colored(2).tensors[0]
    assert torch.equal(again.eval()(images), task.eval()(images))


@pytest.mark.parametrize("with_targets", [False, True])
def test_predicts_class_maps_of_pairs_and_of_bare_images(tmp_path: Path, with_targets: bool) -> None:
    data = colored(5)
    task = SegmentationTask(small(), num_classes=4)
    loader: DataLoader = DataLoader(data if with_targets else data.tensors[0], batch_size=2)  # type: ignore[arg-type]
    maps = quiet_trainer(tmp_path).predict(task, loader)
    assert maps is not None
    found = torch.cat([m for m in maps if isinstance(m, Tensor)])
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), np.stack(class_maps(task, data)))


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(lambda: ffnet_nano(), id="ffnet_nano"),
        pytest.param(
            lambda: lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=19),
            id="lraspp_mobilenet_v3",
        ),
    ],
)
def test_trains_evaluates_and_predicts_any_network(tmp_path: Path, network: type[nn.Module]) -> None:
    task = SegmentationTask(network())
    run = quiet_trainer(tmp_path, fast_dev_run=1)
    loader = DataLoader(colored(2, size=(64, 96)), batch_size=2)
    run.fit(task, loader, loader)
    assert {"train_loss", "val_loss", "val_miou"} <= run.callback_metrics.keys()
    assert set(task.per_class_iou()) <= {"road", "sidewalk", "building", "wall"}
    (maps,) = run.predict(task, loader) or []
    assert isinstance(maps, Tensor)
    assert maps.shape == (2, 64, 96)


def test_logits_are_found_in_what_networks_return() -> None:
    logits = torch.zeros(1, 2, 3, 4)
    for output in (logits, {"aux": torch.ones(1), "out": logits}, (logits, torch.ones(1)), [logits]):
        assert torch.equal(first_tensor(output), logits)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"logits": torch.zeros(1)},
            r"returned a dict with the keys \['logits'\]; expected logits as a tensor",
        ),
        ((), "returned tuple; expected logits"),
        (None, "returned NoneType; expected logits"),
    ],
)
def test_other_outputs_are_refused(output: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        first_tensor(output)


@pytest.mark.parametrize("network", [small(5), nn.Flatten()])
def test_another_number_of_classes_than_the_network_has_is_refused(network: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match=r"returned shape \(.*\); expected \(N, 4, h, w\)\. Build it"):
        SegmentationTask(network, num_classes=4)(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1: expected 2 to 255"),
        ({"num_classes": 256}, "num_classes=256: expected 2 to 255"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: expected"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0: expected 0 or more"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction=1\.0: expected 0 to below 1"),
        ({"class_weights": [1.0]}, r"class_weights=\[1\.0\]: expected 19 numbers, one per class"),
        ({"class_weights": [-1.0] * 19}, "expected 19 numbers, one per class, each 0 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SegmentationTask(small(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["val", "test", "train"])
def test_per_class_iou_before_an_epoch_is_refused(stage: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"per_class_iou\('{stage}'\) has nothing to report yet"):
        SegmentationTask(small(), num_classes=4).per_class_iou(stage)
