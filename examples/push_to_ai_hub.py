"""Quantize FFNet-nano to W8A8 and measure it on a Galaxy S24, or emulate that phone's NPU where there is no token.

Once: qai-hub configure --api_token <token>     (from your account at Qualcomm AI Hub; without: the emulator)
Run: python examples/push_to_ai_hub.py           (about a minute, plus the time that jobs wait in the queue)
"""

import json

import lightning.pytorch as pl

import lightning_quant as lq
from lightning_quant.domains.segmentation.datamodule import SyntheticScenesDataModule
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.task import SegmentationTask

pl.seed_everything(0)
data = SyntheticScenesDataModule("data/scenes", train=200, val=24, height=64, width=128, batch_size=8)
module = SegmentationTask(ffnet_nano(), learning_rate=3e-3)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
pl.Trainer(max_epochs=3, **quiet).fit(module, datamodule=data)

export = lq.DeviceExport("export", name="ffnet_nano", device="Samsung Galaxy S24", monitor="val_miou")
callbacks = [lq.PostTrainingQuantization("w8a8"), export]
pl.Trainer(callbacks=callbacks, **quiet).validate(module, datamodule=data)

for report in export.reports:
    values = report.to_dict()
    for name in ("layers", "latency_us", "float_latency_us"):  # long
        values.pop(name, None)
    print(json.dumps(values, indent=2))
