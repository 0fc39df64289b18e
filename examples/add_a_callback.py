"""Add quantization to a LightningModule that knows nothing of it: train float, fine-tune at W4A8, export, reload.

Run: python examples/add_a_callback.py   (about half a minute on a CPU)
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq


class Classifier(pl.LightningModule):
    """Yours may look as it likes: the callbacks only need the attribute that holds the network."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def quadrants(count: int) -> DataLoader:
    """Noise with one brighter quadrant, whose number is the label."""
    labels = torch.arange(count) % 4
    brighter = torch.eye(4)[labels].reshape(count, 1, 2, 2)
    images = torch.randn(count, 1, 16, 16) + 0.6 * F.interpolate(brighter, scale_factor=8)
    return DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)


pl.seed_everything(0)
train, val = quadrants(1024), quadrants(256)
quiet = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_checkpointing": False}
module = Classifier()
pl.Trainer(max_epochs=5, **quiet).fit(module, train, val)

module.hparams.learning_rate /= 100
callbacks = [lq.QuantizationAwareTraining("w4a8"), lq.DeviceExport("export", name="classifier")]
trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **quiet)
trainer.fit(module, train, val)
trainer.save_checkpoint("classifier-w4a8.ckpt")

again = lq.load_quantized(Classifier, "classifier-w4a8.ckpt")
(metrics,) = pl.Trainer(**quiet).validate(again, val)
print(f"accuracy of the reloaded 4-bit network: {metrics['val_acc']:.3f}")
