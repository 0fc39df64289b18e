"""Quantize a torchvision network with its published weights on images of your own. No labels, no training.

Counted is how many images get the same class as in float: what quantization changed, whatever the task.

Run: python examples/ptq_of_a_pretrained_network.py --images FOLDER    (downloads the weights of MobileNetV2, 14 MB)
     python examples/ptq_of_a_pretrained_network.py --network resnet18 --weights FILE.pth    (a state dict you have)
Without --images, synthetic street scenes are drawn. About half a minute for 64 images.
"""

import argparse
import copy
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split
from torchvision.models import get_model

import lightning_quant as lq
from lightning_quant.domains.segmentation.images import find_images
from lightning_quant.domains.segmentation.scenes import generate_scenes


class SameClass(pl.LightningModule):
    """The network, and a copy that stays in float."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network
        self.reference = copy.deepcopy(network)

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        same = self.model(images).argmax(1) == self.reference(images).argmax(1)
        self.log("val_same_class", same.float().mean(), batch_size=len(images))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--network", default="mobilenet_v2", help="a name from torchvision.models.list_models()")
parser.add_argument("--weights", default="DEFAULT", help="a name torchvision knows, or the file of a state dict")
parser.add_argument("--images", help="folder of images: half of them calibrate, the others are compared")
parser.add_argument("--precision", default="w8a8")
options = parser.parse_args()

own = Path(options.weights).is_file()
network = get_model(options.network, weights=None if own else options.weights)
if own:
    network.load_state_dict(torch.load(options.weights, weights_only=True))

folder = options.images or generate_scenes("data/ptq", train=64, val=0, height=224, width=224) / "leftImg8bit/train"
images = find_images(str(folder), size=(224, 224))  # normalized as torchvision's networks expect
calibration, compared = (DataLoader(part, batch_size=8) for part in random_split(images, (0.5, 0.5)))

quantization = lq.PostTrainingQuantization(options.precision, calibration_dataloader=calibration)
trainer = pl.Trainer(logger=False, callbacks=[quantization, lq.DeviceExport("export", name=options.network)])
(metrics,) = trainer.validate(SameClass(network.eval()), compared)
print(f"{metrics['val_same_class']:.1%} of {len(compared.dataset)} images have the same class as in float")
