"""A SegFormer and a YOLO that nobody here wrote, trained on photographs of streets, then quantized: `make elsewhere`.

Float, post-training quantization, one epoch of quantization-aware training, the exported file and the NPU's emulator,
each by the network's own validation metric. One JSON file a network goes below ``benchmarks/results/elsewhere``.
The boxes are those around the connected parts of a class in CamVid's labels: it has none of its own.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision

import lightning_quant as lq
from benchmarks.accuracy import trainer
from benchmarks.zoo import emulator
from lightning_quant.domains.segmentation.datamodule import CityscapesDataModule
from lightning_quant.domains.segmentation.task import SegmentationTask

RESULTS = Path(__file__).parent / "results" / "elsewhere"
# Samples that the emulator computes.
EMULATED = 24
# Cityscapes' label ids of what is boxed: cars, and people with and without a bicycle.
BOXED = {26: 0, 24: 1, 25: 1}
SMALLEST = 30  # pixels


class Logits(nn.Module):
    """A network of transformers, as a network that answers with its scores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images).logits
        return scores


def segformer() -> nn.Module:
    """SegFormer of transformers, half the widths of B0."""
    import transformers

    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 64, 96], depths=[2, 2, 2, 2], num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=64, num_labels=19,
    )  # fmt: skip
    return Logits(transformers.SegformerForSemanticSegmentation(config))


def yolo() -> nn.Module:
    """Ultralytics' YOLOv8n for two classes."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="ultralytics-"))
    os.environ.setdefault("YOLO_OFFLINE", "true")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    network = DetectionModel("yolov8n.yaml", ch=3, nc=2, verbose=False)
    network.args = get_cfg()
    network.model[-1].export = True  # boxes and scores alone, outside of training, as its own export has it
    return network


class Boxes(Dataset[Any]):
    """CamVid's photographs with the boxes of cars and people: image, boxes as pixels' corners, classes."""

    def __init__(self, root: Path, split: str) -> None:
        self.images = sorted((root / "leftImg8bit" / split).rglob("*_leftImg8bit.png"))
        self.labels = [
            Path(str(one).replace("leftImg8bit/", "gtFine/", 1).replace("_leftImg8bit", "_gtFine_labelIds"))
            for one in self.images
        ]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        from scipy import ndimage

        image = torch.from_numpy(np.asarray(Image.open(self.images[index]).convert("RGB")).copy())
        label = np.asarray(Image.open(self.labels[index]))
        boxes, classes = [], []
        for kind in (0, 1):
            parts, _ = ndimage.label(np.isin(label, [one for one, to in BOXED.items() if to == kind]))
            for number, place in enumerate(ndimage.find_objects(parts), 1):
                if (parts[place] == number).sum() >= SMALLEST:
                    boxes.append([place[1].start, place[0].start, place[1].stop, place[0].stop])
                    classes.append(kind)
        return image.permute(2, 0, 1) / 255, torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(classes).long()


def collated(samples: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """As ultralytics' loss takes a batch: boxes as centers and sizes from 0 to 1, with the image each is in."""
    images = torch.stack([image for image, _, _ in samples])
    size = torch.tensor([images.shape[3], images.shape[2]] * 2)
    corners = torch.cat([boxes for _, boxes, _ in samples]) / size
    centers = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    index = torch.cat([torch.full((len(one[1]),), number) for number, one in enumerate(samples)])
    return {
        "img": images,
        "bboxes": centers,
        "batch_idx": index.float(),
        "cls": torch.cat([c for _, _, c in samples]).float(),
    }


class DetectionTask(pl.LightningModule):
    """The usual module around ultralytics' network and its loss."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model = network
        self.learning_rate = learning_rate
        self.precision_of_boxes = MeanAveragePrecision(iou_type="bbox")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        from ultralytics.utils.loss import v8DetectionLoss

        loss, _ = v8DetectionLoss(self.model)(self.model(batch["img"]), batch)
        return loss.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        from ultralytics.utils.nms import non_max_suppression

        height, width = batch["img"].shape[2:]
        found = non_max_suppression(self.model(batch["img"]), conf_thres=0.01, iou_thres=0.6)
        predicted = [{"boxes": one[:, :4], "scores": one[:, 4], "labels": one[:, 5].long()} for one in found]
        size = torch.tensor([width, height] * 2)
        centers = batch["bboxes"] * size
        corners = torch.cat([centers[:, :2] - centers[:, 2:] / 2, centers[:, :2] + centers[:, 2:] / 2], 1)
        true = [
            {"boxes": corners[of], "labels": batch["cls"][of].long()}
            for of in (batch["batch_idx"] == number for number in range(len(batch["img"])))
        ]
        self.precision_of_boxes.update(predicted, true)

    def on_validation_epoch_end(self) -> None:
        self.log("val_map50", self.precision_of_boxes.compute()["map_50"])
        self.precision_of_boxes.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=max(steps, 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class BoxesData(pl.LightningDataModule):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Boxes(self.root, "train"), 8, shuffle=True, collate_fn=collated)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Boxes(self.root, "val"), 8, collate_fn=collated)


def main() -> None:
    """Train and quantize the networks named, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["segformer", "yolo"], choices=["segformer", "yolo"])
    parser.add_argument("--camvid", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=30, help="of float training")
    parser.add_argument("--precision", default="w8a8")
    arguments = parser.parse_args()
    for name in arguments.networks:
        result = measured(name, arguments.camvid, arguments.epochs, arguments.precision)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}-{arguments.precision}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2), flush=True)


def measured(name: str, camvid: Path, epochs: int, precision: str) -> dict[str, Any]:
    """All figures of a network."""
    pl.seed_everything(0, workers=True, verbose=False)
    task: pl.LightningModule
    data: pl.LightningDataModule
    if name == "segformer":
        task, monitor, rate = SegmentationTask(segformer(), learning_rate=3e-3), "val_miou", 1e-4
        data = CityscapesDataModule(str(camvid), batch_size=8, calibration_samples=64)
    else:
        task, monitor, rate = DetectionTask(yolo(), 2e-3), "val_map50", 5e-5
        data = BoxesData(camvid)
    began = time.perf_counter()
    path = Path("outputs/elsewhere") / f"{name}-{epochs}.ckpt"
    if path.is_file():
        task.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    else:
        trainer(max_epochs=epochs, limit_val_batches=0).fit(task, datamodule=data)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(task.state_dict(), path)
    result: dict[str, Any] = {"network": name, "precision": precision, "monitor": monitor, "epochs": epochs}
    result["seconds"] = {"float training": round(time.perf_counter() - began, 1)}
    (metrics,) = trainer().validate(task, datamodule=data, verbose=False)
    result["float"] = metrics[monitor]
    ptq = copy.deepcopy(task)
    quantization = lq.PostTrainingQuantization(
        precision, calibration_samples=64, calibration_dataloader=data_for_calibration(data)
    )
    (metrics,) = trainer(quantization).validate(ptq, datamodule=data, verbose=False)
    result["ptq"] = metrics[monitor]
    task.learning_rate = rate
    began = time.perf_counter()
    training = lq.QuantizationAwareTraining(precision, calibration_samples=64, monitor=monitor, mode="max")
    trainer(training, max_epochs=1, limit_val_batches=0).fit(task, datamodule=data)
    result["seconds"]["quantized training"] = round(time.perf_counter() - began, 1)
    (metrics,) = trainer().validate(task, datamodule=data, verbose=False)
    result["qat"] = metrics[monitor]
    folder = Path("outputs/elsewhere") / f"{name}-{precision}"
    export = lq.DeviceExport(
        folder, target="htp_emulator", device=emulator.DEVICE, samples=EMULATED, monitor=monitor, mode="max",
        report=False, on_failure="raise", timeout=1200,
    )  # fmt: skip
    trainer(export).validate(task, datamodule=data, verbose=False)
    assert export.bundle is not None
    (report,) = export.reports
    assert report.layers is not None
    result["export"] = {
        "parity": export.bundle.manifest.to_dict()["parity"],
        "bytes": export.bundle.manifest.bytes,
        "emulated_samples": EMULATED,
        "metric_on_these": report.metric,
        "against_simulation": report.to_dict()["against_simulation"],
        "layers": {unit: len(names) for unit, names in report.layers.items()},
        "in_float": len(report.float_islands or []),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {**result, "commit": commit.stdout.strip(), "date": datetime.date.today().isoformat()}


def data_for_calibration(data: pl.LightningDataModule) -> Any:
    """Training images: validation images are never calibrated with."""
    data.setup("fit")
    return data.train_dataloader()


if __name__ == "__main__":
    main()
