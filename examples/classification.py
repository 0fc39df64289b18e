"""Quantize a classifier of your own: a torchvision network, a folder of images, at most one point of accuracy lost.

The folder has train/<class>/ and val/<class>/ with PNG or JPEG files. Without --images, six shapes are drawn.

Run: python examples/classification.py                      (about a minute on a CPU)
     python examples/classification.py --images FOLDER --network mobilenet_v3_small --size 224 --epochs 30
"""

import argparse

import lightning.pytorch as pl
from torchvision.models import get_model

import lightning_quant as lq
from lightning_quant.domains.classification.datamodule import ImageFolderDataModule
from lightning_quant.domains.classification.shapes import draw_shapes
from lightning_quant.domains.classification.task import ClassificationTask

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", help="folder with train/<class>/ and val/<class>/")
parser.add_argument("--network", default="resnet18", help="a name from torchvision.models.list_models()")
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--precision", default="w8a8")
options = parser.parse_args()

pl.seed_everything(0)
folder = options.images or draw_shapes("data/shapes", train=768, val=192, size=options.size)
data = ImageFolderDataModule(str(folder), size=options.size, crop_scale=(0.7, 1.0), calibration_samples=96)
classes = len(data.class_names)
module = ClassificationTask(get_model(options.network, num_classes=classes), num_classes=classes)
quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
pl.Trainer(max_epochs=options.epochs, **quiet).fit(module, datamodule=data)

module.learning_rate /= 100
quantization = lq.QuantizationAwareTraining(options.precision, max_drop=0.01, monitor="val_acc")
pl.Trainer(max_epochs=1, callbacks=[quantization], **quiet).fit(module, datamodule=data)
best = quantization.result.best
print(f"float {quantization.result.float_metric:.4f}, {options.precision} after {best.rung} {best.metric:.4f}")

# Pixels in, the three likeliest classes and their scores out, both computed on the device.
pixels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
export = lq.DeviceExport("export", name=options.network, inputs=pixels, outputs={"function": "top_k", "k": 3})
callbacks = [lq.PostTrainingQuantization(options.precision), export]  # finds the network quantized already
pl.Trainer(callbacks=callbacks, **quiet).validate(module, datamodule=data)
print(f"report: export/{options.network}.report/report.html")
