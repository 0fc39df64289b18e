"""What a checkpoint or a bundle holds may not hang on hashes of strings, of which each process of Python has its own.

A checkpoint holds the state of an optimizer by the places of its parameters.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from tests.helpers.processes import environment
from tests.helpers.small import SmallModule
from tests.helpers.trainers import quiet_trainer


class Mixed(nn.Module):
    """Convolutions, attention, and joined, split and multiplied tensors: 3×8×8 images to 4 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.both, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        tokens = self.attention(y.flatten(2).transpose(1, 2))
        tokens = (tokens @ tokens.transpose(1, 2).relu()).softmax(-1) @ tokens
        one, other = self.both(y).chunk(2, 1)
        maps = torch.cat([one.sigmoid() * other, other.tanh()], 1)
        return self.head(torch.cat([tokens.mean(1), maps.mean((2, 3))], 1))


def fit(folder: Path, **options: Any) -> tuple[Trainer, SmallModule]:
    """Train with a clipped norm, which is a sum over all parameters."""
    seed_everything(0, verbose=False)
    data = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 4), 8)
    module = SmallModule(Mixed())
    export = lq.DeviceExport(folder / "export", target=None, name="net", report=False)
    epochs = 2 if options else 1
    trainer = quiet_trainer(
        folder, lq.QuantizationAwareTraining("w8a16"), export, max_epochs=epochs, gradient_clip_val=0.1
    )
    trainer.fit(module, data, **options)
    return trainer, module


def resume(folder: Path, checkpoint: Path) -> str:
    """Resume and export; return a hash of all that came out."""
    _, module = fit(folder, ckpt_path=checkpoint)
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else b"")
    for file in sorted(folder.rglob("*.*")):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


@pytest.mark.slow
def test_a_fit_is_resumed_to_the_same_bits_in_whatever_process(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path / "first")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    ends = set()
    for seed in ("2", "3"):
        command = [sys.executable, "-m", __name__, str(tmp_path / seed), str(tmp_path / "last.ckpt")]
        variables = environment(PYTHONHASHSEED=seed)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        ends.add(done.stdout.split()[-1])
    assert [len(one) for one in ends] == [64]


if __name__ == "__main__":
    print(resume(*map(Path, sys.argv[1:])))
