"""A network with several inputs and a dict of outputs is quantized as it is: same arguments, same keys.

Run: python examples/dict_outputs.py   (about 20 seconds on a CPU)
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq


class SpeedAndSteering(nn.Module):
    """A camera image and the car's own speed to two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(nn.Conv2d(3, 16, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.joint = nn.Sequential(nn.Linear(16 * 4 + 1, 32), nn.ReLU())
        self.brake, self.steer = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, image: Tensor, *, speed: Tensor) -> dict[str, Tensor]:
        features = self.joint(torch.cat((self.camera(image), speed), dim=1))
        return {"brake": self.brake(features), "steer": self.steer(features)}


class Driver(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = SpeedAndSteering()

    def training_step(self, batch, batch_idx, stage="train"):
        image, speed, brake, steer = batch
        answer = self.network(image, speed=speed)
        loss = F.cross_entropy(answer["brake"], brake) + F.mse_loss(answer["steer"], steer)
        self.log(f"{stage}_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx, stage="val")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


pl.seed_everything(0)
image, speed = torch.randn(512, 3, 32, 32) + torch.randn(512, 3, 1, 1), torch.rand(512, 1)
data = TensorDataset(image, speed, (speed[:, 0] > 0.5).long(), image.mean((1, 2, 3))[:, None])
loader, quiet = DataLoader(data, batch_size=32), {"logger": False, "enable_checkpointing": False}
module = Driver()
pl.Trainer(max_epochs=10, **quiet).fit(module, loader)
(before,) = pl.Trainer(**quiet).validate(module, loader)
quantization = lq.PostTrainingQuantization("w8a8", network="network", calibration_dataloader=loader)
(after,) = pl.Trainer(callbacks=[quantization, lq.DeviceExport("export")], **quiet).validate(module, loader)
print("answers:", {name: tuple(value.shape) for name, value in module.network(image[:4], speed=speed[:4]).items()})
print(f"loss in float: {before['val_loss']:.4f}, at W8A8: {after['val_loss']:.4f}")
