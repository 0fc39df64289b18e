"""Train only if nothing cheaper is good enough: at most half a point of mIoU may be lost to 4-bit weights.

`fit` measures the float network, tries the rungs from cheap to dear, and trains only if none is within max_drop.

Run: python examples/qat_with_the_gate.py                 (about a minute on a CPU)
     python examples/qat_with_the_gate.py --max-drop -1   (no rung can be good enough: it trains)
"""

import argparse

import lightning.pytorch as pl

import lightning_quant as lq
from lightning_quant.domains.segmentation.datamodule import SyntheticScenesDataModule
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.task import SegmentationTask

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--precision", default="w4a8")
parser.add_argument("--max-drop", type=float, default=0.005)
options = parser.parse_args()

pl.seed_everything(0)
data = SyntheticScenesDataModule("data/scenes", train=200, val=24, height=64, width=128, batch_size=8)
module = SegmentationTask(ffnet_nano(), learning_rate=3e-3)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
pl.Trainer(max_epochs=8, **quiet).fit(module, datamodule=data)

module.learning_rate /= 100
quantization = lq.QuantizationAwareTraining(
    options.precision,
    max_drop=options.max_drop,
    monitor="val_miou",
    rungs=("ptq", "bn_reestimation", "seq_mse", "adaround"),
)
pl.Trainer(max_epochs=1, callbacks=[quantization], **quiet).fit(module, datamodule=data)

result = quantization.result
print(f"\nfloat {result.monitor}: {result.float_metric:.4f}, compared with: {result.reference:.4f}")
print(f"{'rung':16} {'mIoU':>7} {'drop':>8} {'seconds':>8}  outcome")
for rung in result.rungs:
    print(f"{rung.rung:16} {rung.metric:7.4f} {rung.drop:8.4f} {rung.seconds:8.1f}  {rung.reason}")
print(f"taken: {result.best.rung}; within max_drop: {result.satisfied}; checkpoint: {quantization.best_model_path}")
