"""The small network, module and data that the tests train: seconds for a whole fit, yet with all that matters.

Convolutions with batch norms to fold, a functional addition that only ``prepare_model`` gives a quantizer, and
a head whose output depends on the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from lightning_quant.simulation.network import QuantizedNetwork

SIZE = 8
CLASSES = 4


class SmallNet(nn.Module):
    """3×8×8 images to 4 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = x + self.branch(x)
        return self.head(x.mean((2, 3)))


def small_net(seed: int = 0) -> SmallNet:
    """A network with reproducible weights and batch norm statistics that folding has to get right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNet()
        nn.init.uniform_(network.norm.weight, 0.5, 1.5)
        nn.init.normal_(network.norm.bias)
        network.norm.running_mean = torch.randn(6)
        network.norm.running_var = torch.rand(6) + 0.5
    return network


def small_data(count: int = 32, seed: int = 1) -> TensorDataset:
    """Images whose brightest quadrant is the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    labels = torch.arange(count) % CLASSES
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = SIZE // 2 * (label // 2), SIZE // 2 * (label % 2)
        image[:, row : row + SIZE // 2, column : column + SIZE // 2] += 1
    return TensorDataset(images, labels)


class EpochSampler(Sampler[int]):
    """Another order every epoch, and the same one whenever that epoch is run (Lightning calls ``set_epoch``)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def small_loader(data: Dataset[Any] | None = None, batch_size: int = 8, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(data or small_data(), batch_size=batch_size, **arguments)


class SmallModule(pl.LightningModule):
    """An ordinary classifier; remembers the batches it trained on and how its steps were called."""

    def __init__(
        self,
        network: nn.Module | None = None,
        optimizers: Callable[[SmallModule], Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = network if network is not None else small_net()
        self._optimizers = optimizers or (lambda module: torch.optim.AdamW(module.parameters(), lr=1e-2))
        self.trained_on: list[float] = []
        self._called = cast("list[str]", []).append  # not an attribute that measurements could put back

    @property
    def called(self) -> list[str]:
        called: list[str] = self._called.__self__  # type: ignore[attr-defined]
        return called

    def _note(self, step: str) -> None:
        if "log" not in vars(self):  # a step that is run for the calls it makes of the network logs nothing
            self._called(step)

    @property
    def quantized(self) -> QuantizedNetwork:
        known = QuantizedNetwork.of(self.model)
        assert known is not None
        return known

    def _loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.trained_on.append(float(batch[0].sum()))
        self._note("training")
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self._loss(batch)
        self._note("validation")
        self.log("val_loss", loss)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        loss = self._loss(batch)
        self._note("test")
        self.log("test_loss", loss)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.model(batch[0])
        self._note("predict")
        return scores

    def configure_optimizers(self) -> Any:
        return self._optimizers(self)


def encodings(network: QuantizedNetwork) -> dict[str, Tensor]:
    """Every range of a quantized network, by name."""
    state = network.network.state_dict()
    return {
        name: value.detach().clone()
        for name, value in state.items()
        if name.endswith((".min", ".max")) and "quantizer" in name
    }


def assert_same_tensors(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two state dicts (of a module or an optimizer) agree bit for bit; none is empty by mistake."""
    assert expected
    assert _first_difference(actual, expected) is None


def _first_difference(a: Any, b: Any, where: str = "") -> str | None:
    if isinstance(b, Tensor):
        return None if torch.equal(a, b) else where
    if isinstance(b, Mapping):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(a[key], b[key], f"{where}.{key}") for key in b]
    elif isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries"
        pairs = [(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else f"{where}: {a!r} and {b!r}"
    return next((found for pair in pairs if (found := _first_difference(*pair)) is not None), None)
