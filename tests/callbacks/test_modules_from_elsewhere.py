"""Networks and modules that others wrote, unchanged: whatever goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import Trainer
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringModel,
    DemoModel,
    ManualOptimBoringModel,
    Net,
    RandomDataset,
    RandomIterableDataset,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from lightning_quant.errors import PreflightError
from lightning_quant.simulation.network import QuantizedNetwork
from tests.helpers.small import SmallNet, small_loader, small_net

pytestmark = pytest.mark.slow

MakeTrainer = Callable[..., Trainer]


# Lightning's own demos


@pytest.mark.parametrize("demo", [BoringModel, ManualOptimBoringModel])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_boring_models(trainer: MakeTrainer, demo: type[BoringModel], stage: str) -> None:
    module = demo()
    before = module.layer.weight.detach().clone()
    one = trainer(lq.QuantizationAwareTraining(network="layer"), max_epochs=1)
    getattr(one, stage)(module)
    assert QuantizedNetwork.of(module.layer) is not None
    assert module.layer.calibrated
    assert torch.equal(module.layer.weight, before) == (stage != "fit")


def test_boring_data_module(trainer: MakeTrainer) -> None:
    module = BoringModel()
    one = trainer(lq.QuantizationAwareTraining(network="layer"), max_epochs=1)
    one.fit(module, datamodule=BoringDataModule())
    one.test(module, datamodule=BoringDataModule(), verbose=False)
    assert module.layer.calibrated


def test_boring_model_on_iterable_data(trainer: MakeTrainer) -> None:
    module = BoringModel()
    data = DataLoader(RandomIterableDataset(32, 64))
    trainer(lq.QuantizationAwareTraining(network="layer"), max_epochs=1).fit(module, data, data)
    assert module.layer.calibrated


def test_demo_model_with_only_a_training_step(trainer: MakeTrainer) -> None:
    module = DemoModel()
    trainer(lq.QuantizationAwareTraining(network="l1"), max_epochs=1).fit(module, DataLoader(RandomDataset(32, 64)))
    assert module.l1.calibrated


class Digits(pl.LightningModule):
    """The classifier of Lightning's basic example, with the network of its demos."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adadelta(self.net.parameters())


def test_demo_net(trainer: MakeTrainer) -> None:
    module = Digits()
    data = DataLoader(TensorDataset(torch.rand(4, 1, 28, 28), torch.arange(4)), batch_size=2)
    trainer(lq.QuantizationAwareTraining(network="net", strict=True), max_epochs=1).fit(module, data)
    assert module.net.findings == []


def test_demo_transformer_with_two_inputs_of_words(trainer: MakeTrainer) -> None:
    class Words(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Transformer(vocab_size=20, ninp=8, nhid=8, nlayers=1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, target = batch
            return F.nll_loss(self.model(inputs, target), target.view(-1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    words = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    module = Words()
    data = DataLoader(TensorDataset(words, words.roll(1, 1)), batch_size=2)
    trainer(lq.QuantizationAwareTraining(), max_epochs=1).fit(module, data)
    assert module.model.calibrated
    assert module.model.vocab_size == 20


# Networks of well-known libraries


class Segments(pl.LightningModule):
    """A segmentation module as people write it, for outputs of any structure."""

    def __init__(self, network: nn.Module, scores: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = network
        self.scores = scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.scores(self.model(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def pictures(classes: int, pixels: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 64, 64) if pixels else (4,)
    labels = torch.randint(0, classes, shape, generator=generator)
    return DataLoader(TensorDataset(torch.randn(4, 3, 64, 64, generator=generator), labels), batch_size=2)


FAMOUS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor], bool]] = {
    "lraspp": (
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=5
        ),
        lambda output: output["out"],
        True,
    ),
    "deeplabv3": (
        lambda: torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        ),
        lambda output: output["out"] + 0.5 * output["aux"],
        True,
    ),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None, num_classes=5), lambda output: output, False),
    "timm": (
        lambda: timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=5),
        lambda output: output,
        False,
    ),
    "smp": (
        lambda: smp.Unet("resnet18", encoder_weights=None, classes=5, decoder_channels=(32, 16, 16, 8, 8)),
        lambda output: output,
        True,
    ),
}


# Their parts are in the others.
ALIKE = {"lraspp", "resnet18"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.torture if name in ALIKE else ()) for name in FAMOUS]
)
def test_famous_networks(trainer: MakeTrainer, name: str) -> None:
    make, scores, pixels = FAMOUS[name]
    torch.manual_seed(0)
    network = make()
    data = pictures(5, pixels)
    plain = trainer(limit_val_batches=1).validate(Segments(network, scores), data, verbose=False)[0]["val_loss"]
    module = Segments(network, scores)
    one = trainer(lq.QuantizationAwareTraining("w8a16"), max_steps=1, limit_val_batches=1)
    losses: list[float] = []

    class First(pl.Callback):
        def on_sanity_check_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
            losses.append(float(trainer.callback_metrics["val_loss"]))

    one.callbacks.append(First())
    one.fit(module, data, data)
    # at 16 bits, untrained, the quantized network is the float one up to its 8-bit weights
    assert losses[0] == pytest.approx(plain, rel=0.05)
    with torch.no_grad():
        images = next(iter(data))[0]
        assert type(module.model.eval()(images)) is type(network.eval()(images))
    assert not [finding for finding in module.model.findings if "traced" in finding.problem]
    assert any(parameter.grad is not None for parameter in module.model.range_parameters())


# Any structure of inputs and outputs


class Pair(NamedTuple):
    scores: Tensor
    features: Tensor


@dataclass
class Answer:
    scores: Tensor
    features: Tensor


class Structured(nn.Module):
    """Images, an optional mask by keyword and a table of extras; answers in a structure of its own."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = small_net()
        self.extra = nn.Linear(2, 4)
        self.answer = answer

    def forward(self, images: Tensor, extras: dict[str, Tensor], mask: Tensor | None = None, scale: float = 1.0) -> Any:
        if mask is not None:
            images = images * mask
        features = self.extra(extras["position"])
        scores = self.body(images) + features
        return self.answer(scores * scale, features)


ANSWERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], type]] = {
    "tensor": (lambda s, f: s, lambda out: out, Tensor),
    "tuple": (lambda s, f: (s, f), lambda out: out[0] + out[1], tuple),
    "list": (lambda s, f: [s, f], lambda out: out[0] + out[1], list),
    "dict": (lambda s, f: {"s": s, "f": f}, lambda out: out["s"] + out["f"], dict),
    "nested": (lambda s, f: {"s": (s, [f])}, lambda out: out["s"][0] + out["s"][1][0], dict),
    "namedtuple": (Pair, lambda out: out.scores + out.features, Pair),
    "dataclass": (Answer, lambda out: out.scores + out.features, Answer),
}


class TakesStructures(pl.LightningModule):
    def __init__(self, answer: str, masked: bool) -> None:
        super().__init__()
        make, self.read, _ = ANSWERS[answer]
        self.net = nn.Module()
        self.net.backbone = Structured(make)  # nested in an attribute
        self.masked = masked
        self.answered: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        extras = {"position": images[:, :2, 0, 0]}
        mask = {"mask": (images > 0).float()} if self.masked else {"mask": None}
        output = self.net.backbone(images, extras, scale=2.0, **mask)
        self.answered.append(output)
        return F.cross_entropy(self.read(output), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
def test_structures(trainer: MakeTrainer, tmp_path: Any, answer: str, masked: bool) -> None:
    torch.manual_seed(0)
    module = TakesStructures(answer, masked)
    torch.manual_seed(0)
    plain = TakesStructures(answer, masked)
    data = small_loader()
    export = lq.DeviceExport(tmp_path, samples=2)
    callback = lq.PostTrainingQuantization("w8a16", network="net.backbone", calibration_dataloader=data)
    quantized = trainer(callback, export).validate(module, data, verbose=False)[0]["val_loss"]
    expected = trainer().validate(plain, data, verbose=False)[0]["val_loss"]
    assert quantized == pytest.approx(expected, rel=0.02)
    assert quantized != expected
    assert isinstance(module.answered[-1], ANSWERS[answer][2])
    assert type(module.answered[-1]) is type(plain.answered[-1])
    assert export.bundle is not None
    names = export.bundle.manifest.input_names
    assert names == ["images", "position", *(["mask"] if masked else [])]
    training = trainer(lq.QuantizationAwareTraining("w8a16", network="net.backbone"), max_epochs=1)
    training.fit(module, data)
    assert module.net.backbone.calibrated


class Unwraps(pl.LightningModule):
    """Batches that are dicts, a network called by keyword only, and access to its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Sized()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.model(images=batch["image"])
        penalty = self.model.body.head.weight.square().mean() + self.model.penalty()
        return F.cross_entropy(scores[:, : self.model.classes], batch["label"]) + penalty

    def configure_optimizers(self) -> Any:
        rest = [p for p in self.model.parameters() if all(p is not h for h in self.model.body.head.parameters())]
        return torch.optim.SGD([{"params": self.model.body.head.parameters(), "lr": 0.1}, {"params": rest}], lr=0.01)


class Sized(nn.Module):
    names = ("a", "b", "c", "d")

    def __init__(self) -> None:
        super().__init__()
        self.body = small_net()
        self.classes = 4

    @property
    def size(self) -> int:
        return self.classes * 2

    @staticmethod
    def version() -> str:
        return "one"

    def penalty(self) -> Tensor:
        return self.body.branch.weight.abs().mean() / self.classes

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def test_dict_batches_and_access_to_parts(trainer: MakeTrainer) -> None:
    images, labels = small_loader().dataset.tensors  # type: ignore[attr-defined]
    data = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    module = Unwraps()
    head = module.model.body.head.weight.detach().clone()
    one = trainer(lq.QuantizationAwareTraining(), max_epochs=1)
    one.fit(module, DataLoader(data, batch_size=8))  # type: ignore[arg-type]
    assert not torch.equal(module.model.body.head.weight, head)
    assert [len(group["params"]) > 0 for group in one.optimizers[0].param_groups] == [True] * 4
    # what tracing drops is still there
    assert (module.model.classes, module.model.size, module.model.version()) == (4, 8, "one")
    assert module.model.names == ("a", "b", "c", "d")
    assert isinstance(module.model.body.stem, nn.Conv2d)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        module.model.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("placeholder", [True, False])
def test_network_made_in_configure_model(trainer: MakeTrainer, placeholder: bool) -> None:
    class Late(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            if placeholder:
                self.model = None

        def configure_model(self) -> None:
            if getattr(self, "model", None) is None:
                self.model = small_net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Late()
    trainer(lq.QuantizationAwareTraining(), max_epochs=1).fit(module, small_loader())
    assert QuantizedNetwork.of(module.model) is not None


def test_shared_parts_are_pointed_out(trainer: MakeTrainer) -> None:
    class Aliased(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = small_net()
            self.last = nn.Linear(6, 4)
            self.last.weight = self.model.head.weight
            self.same = self.model.head  # the layer itself, which is quantized where it is

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.model(batch[0])

    data = small_loader()
    callback = lq.PostTrainingQuantization(calibration_dataloader=data)
    with pytest.warns(UserWarning, match=r"last shares parameters with 'model'"):
        trainer(callback).validate(Aliased(), data, verbose=False)
    module = Aliased()
    with pytest.raises(PreflightError, match=r"last +shares parameters"):
        trainer(lq.PostTrainingQuantization(calibration_dataloader=data, strict=True)).validate(module, data)
    assert type(module.model) is SmallNet
