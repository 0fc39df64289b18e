"""Detect people, cars and bicycles: train a small detector, quantize it, export it, draw what both networks see.

Run: python examples/detection.py   (about two minutes on a CPU; pip install 'lightning-quant[detection]')
"""

import lightning.pytorch as pl

import lightning_quant as lq
from lightning_quant.domains.detection.datamodule import SceneBoxesDataModule
from lightning_quant.domains.detection.network import fcos_nano
from lightning_quant.domains.detection.task import DetectionTask

pl.seed_everything(0)
# Boxes around what the label maps of synthetic street scenes hold; with COCO at hand, CocoDataModule("coco").
data = SceneBoxesDataModule("scenes", classes=("person", "car", "bicycle"), train=160, val=40, calibration_samples=64)
quiet = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_checkpointing": False}

task = DetectionTask(fcos_nano(3), class_names=data.classes)
pl.Trainer(max_epochs=8, gradient_clip_val=1.0, limit_val_batches=0, **quiet).fit(task, datamodule=data)
(before,) = pl.Trainer(**quiet).validate(task, datamodule=data, verbose=False)

# The network returns scores and distances apart: joined in one tensor, 8 bits would round the scores to 0.
export = lq.DeviceExport("export", name="detector", monitor="val_map50")
callbacks = [lq.PostTrainingQuantization("w8a8", calibration_samples=64), export]
(after,) = pl.Trainer(callbacks=callbacks, **quiet).validate(task, datamodule=data, verbose=False)

for name, value in task.class_figures()["AP"].items():
    print(f"average precision of {name}: {value:.3f}")
print(f"val_map50 in float: {before['val_map50']:.4f}, at W8A8: {after['val_map50']:.4f}")
