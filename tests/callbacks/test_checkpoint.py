"""load_quantized and read_manifest: round trips, and files that cannot be trusted."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.deploy.export import export_bundle
from lightning_quant.errors import CheckpointError
from lightning_quant.simulation.inputs import NetworkInputs
from tests.helpers.small import SmallModule, assert_same_tensors, small_data, small_loader, small_net

MakeTrainer = Callable[..., Trainer]


class Configured(LightningModule):
    """Saves its hyperparameters and makes its network in configure_model."""

    def __init__(self, width: int, extra: str = "none") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module | None = None
        self.scale = nn.Parameter(torch.tensor(float(width)))

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Conv2d(3, self.hparams["width"], 3), nn.ReLU(), nn.Flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.net is not None
        self.log("mean", self.net(batch[0]).mean() * self.scale)


@pytest.fixture
def checkpoint(trainer: MakeTrainer, tmp_path: Path) -> tuple[Path, SmallModule]:
    module = SmallModule()
    one = trainer(lq.QuantizationAwareTraining("w4a8", overrides={"head": "w8a16"}), max_epochs=1)
    one.fit(module, small_loader())
    one.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", module


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint with its content changed."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path.with_name("edited.ckpt"))
    return path.with_name("edited.ckpt")


def manifest_in(content: dict[str, Any]) -> dict[str, Any]:
    return content["state_dict"]["model._extra_state"]


def test_round_trip(checkpoint: tuple[Path, SmallModule]) -> None:
    path, module = checkpoint
    loaded = lq.load_quantized(SmallModule, path)
    assert_same_tensors(loaded.state_dict(), module.state_dict())
    assert not loaded.training
    images = small_data().tensors[0]
    with torch.no_grad():
        assert torch.equal(loaded.model(images), module.eval().model(images))


class Steep(LightningModule):
    """Batch norms that multiply by a hundred, so that a network that had them twice would be far from any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for index in range(6):
            norm = nn.BatchNorm2d(3)
            assert norm.running_var is not None
            norm.running_var.fill_(1e-4)
            conv = nn.Conv2d(3, 3, 3, padding=1, bias=index % 2 == 0)
            nn.init.normal_(conv.weight, std=0.002)
            parts += [conv, norm, nn.SiLU()]
        self.model = nn.Sequential(*parts)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self.model(batch[0]).mean())


def test_batch_norms_that_were_folded_are_not_there_twice(trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Steep()
    one = trainer(lq.PostTrainingQuantization("w8a16", calibration_dataloader=small_loader()))
    one.validate(module, small_loader())
    one.save_checkpoint(tmp_path / "steep.ckpt")
    images = small_data()[0][0][None]
    loaded = lq.load_quantized(Steep, tmp_path / "steep.ckpt")
    assert not any(isinstance(one, nn.BatchNorm2d) for one in loaded.modules())
    assert not loaded.model.findings
    assert torch.equal(loaded.model(images), module.eval().model(images))


def test_ends_of_a_range_that_training_carried_past_each_other(
    checkpoint: tuple[Path, SmallModule], tmp_path: Path
) -> None:
    path, _ = checkpoint

    def cross(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        least = next(name for name in state if "output_quantizers" in name and name.endswith(".min"))
        most = least.removesuffix("min") + "max"
        state[least], state[most] = state[most], state[least]

    loaded = lq.load_quantized(SmallModule, edited(path, cross))
    image = small_data()[0][0][None]
    assert loaded.model(image).isfinite().all()
    bundle = export_bundle(loaded.quantized, tmp_path / "bundle", [NetworkInputs((image,))])
    parity = bundle.manifest.parity.psnr_db
    assert parity is None or parity > 60


class Activated(nn.BatchNorm2d):
    """As timm has it: it is folded if it computes what a batch norm with an activation behind it does."""

    def __init__(self) -> None:
        super().__init__(4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


class Deep(Steep):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), Activated()) for _ in range(12)]
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_weights_that_only_ranges_hold_in_bounds(trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Deep()
    one = trainer(lq.PostTrainingQuantization(calibration_dataloader=small_loader()))
    one.validate(module, small_loader(), verbose=False)
    with torch.no_grad():
        for index in range(1, 13):
            weight = module.model[index][0].weight.abs_().mul_(1e6)
            weight[::2] *= -1 if index > 10 else 1  # from infinity less infinity on there are no numbers
            weight[:, ::2] *= -1 if index > 10 else 1
    one.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lq.load_quantized(Deep, tmp_path / "last.ckpt")
    assert_same_tensors(loaded.state_dict(), module.state_dict())


def test_network_passed_in_is_the_one_that_is_quantized(checkpoint: tuple[Path, SmallModule]) -> None:
    path, module = checkpoint
    network = small_net(seed=9)
    loaded = lq.load_quantized(SmallModule, path, network=network)
    assert loaded.model is network
    assert_same_tensors(network.state_dict(), module.model.state_dict())


def test_a_loaded_module_trains_on(checkpoint: tuple[Path, SmallModule], trainer: MakeTrainer) -> None:
    path, module = checkpoint
    loaded = lq.load_quantized(SmallModule, path)
    (metrics,) = trainer().validate(loaded, small_loader(), verbose=False)
    (expected,) = trainer().validate(module, small_loader(), verbose=False)
    assert metrics == expected
    callback = lq.QuantizationAwareTraining("w4a8", overrides={"head": "w8a16"})
    trainer(callback, max_epochs=1).fit(loaded, small_loader())
    assert loaded.called.count("training") == 4


def test_network_made_in_configure_model(trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Configured(5)
    one = trainer(lq.PostTrainingQuantization(network="net", calibration_dataloader=small_loader()))
    (expected,) = one.validate(module, small_loader(), verbose=False)
    one.save_checkpoint(tmp_path / "configured.ckpt")
    loaded = lq.load_quantized(Configured, tmp_path / "configured.ckpt", extra="given")
    assert loaded.hparams["extra"] == "given"
    assert trainer().validate(loaded, small_loader(), verbose=False) == [expected]


def test_own_hardware_config(trainer: MakeTrainer, tmp_path: Path) -> None:
    import aimet_torch

    stock = next(Path(aimet_torch.__file__).parent.rglob("htp_quantsim_config_v73.json"))
    mine = tmp_path / "mine.json"
    shutil.copy(stock, mine)
    module = SmallModule()
    one = trainer(lq.PostTrainingQuantization(hardware=str(mine)))
    one.fit(module, small_loader())
    one.save_checkpoint(tmp_path / "mine.ckpt")
    assert lq.read_manifest(tmp_path / "mine.ckpt")["hardware"].startswith("mine.json (sha256 ")
    loaded = lq.load_quantized(SmallModule, tmp_path / "mine.ckpt", hardware=str(mine))
    assert_same_tensors(loaded.state_dict(), module.state_dict())
    with pytest.raises(CheckpointError, match=r"hardware.*'mine\.json .*hardware=\.\.\."):
        lq.load_quantized(SmallModule, tmp_path / "mine.ckpt")


def test_manifest_says_how_it_was_quantized(checkpoint: tuple[Path, SmallModule]) -> None:
    manifest = lq.read_manifest(checkpoint[0])
    assert re.fullmatch(r"[0-9a-f]{64}", manifest.pop("float_sha256"))
    assert manifest == {
        "lightning_quant": version("lightning-quant"),
        "format_version": 1,
        "other_inputs": [],
        "aimet_torch": version("aimet-torch"),
        "torch": version("torch"),
        "precision": "w4a8",
        "hardware": "htp_v75",
        "overrides": {"head": "w8a16"},
        "range_estimator": "min_max",
        "calibrated": True,
        "equalized": False,
        "raised": {},
        "inputs": {"args": [{"tensor": [1, 3, 8, 8], "dtype": "float32", "batch": [0, 1]}], "kwargs": {}},
    }
    assert json.loads(json.dumps(manifest)) == manifest


# Files that do not fit


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No checkpoint at '.*nowhere\.ckpt'"):
        lq.load_quantized(SmallModule, tmp_path / "nowhere.ckpt")


def test_float_checkpoint(trainer: MakeTrainer, tmp_path: Path) -> None:
    one = trainer(max_epochs=1)
    one.fit(SmallModule(), small_loader())
    one.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(CheckpointError, match=r"holds no quantized network.*load_from_checkpoint"):
        lq.read_manifest(tmp_path / "float.ckpt")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("read", [lq.read_manifest, lambda path: lq.load_quantized(SmallModule, path)])
def test_truncated_file(checkpoint: tuple[Path, SmallModule], keep: float, read: Any) -> None:
    path, _ = checkpoint
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(CheckpointError, match=r"last\.ckpt is not a readable checkpoint|or is damaged"):
        read(path)


def test_damaged_file(checkpoint: tuple[Path, SmallModule]) -> None:
    path, _ = checkpoint
    path.write_bytes(b"this is no checkpoint" * 100)
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        lq.load_quantized(SmallModule, path)


def test_file_of_something_else(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="is not a Lightning checkpoint: expected a dict with a 'state_dict'"):
        lq.read_manifest(tmp_path / "list.ckpt")


class Executes:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("read", [lq.read_manifest, lambda path: lq.load_quantized(SmallModule, path)])
def test_foreign_code_is_not_executed(checkpoint: tuple[Path, SmallModule], tmp_path: Path, read: Any) -> None:
    trap = tmp_path / "sprung"
    content = torch.load(checkpoint[0], weights_only=True)
    torch.save({**content, "hyper_parameters": {"width": Executes(trap)}}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt holds objects that are not loaded for safety"):
        read(tmp_path / "evil.ckpt")
    assert not trap.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)  # the trap is a real one
    assert trap.exists()


@pytest.mark.parametrize("into_trainer", [False, True])
def test_later_format(checkpoint: tuple[Path, SmallModule], trainer: MakeTrainer, into_trainer: bool) -> None:
    path = edited(checkpoint[0], lambda content: manifest_in(content).update(format_version=2))

    def into_the_trainer() -> None:
        callback = lq.PostTrainingQuantization("w4a8", overrides={"head": "w8a16"})
        trainer(callback).validate(SmallModule(), small_loader(), ckpt_path=path)

    with pytest.raises(CheckpointError, match=r"format_version=2.*this version reads 1"):
        into_the_trainer() if into_trainer else lq.load_quantized(SmallModule, path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: manifest_in(content).pop("precision"),
        lambda content: manifest_in(content).update(precision="w3a7"),
        lambda content: manifest_in(content).update(overrides={"nothing.*": "w8a8"}),
        lambda content: manifest_in(content).pop("inputs"),
        lambda content: manifest_in(content).update(inputs={"args": [{"object": "os.system"}], "kwargs": {}}),
        lambda content: manifest_in(content).update(inputs={"args": [{"tensor": [10**9] * 3, "dtype": "float32"}]}),
        lambda content: content["state_dict"].pop("model.head.weight"),
        lambda content: content["state_dict"].update({"model.network.head.weight": torch.zeros(7)}),
        lambda content: content["state_dict"].update({"unknown": torch.zeros(7)}),
    ],
)
def test_content_that_does_not_fit(checkpoint: tuple[Path, SmallModule], edit: Any) -> None:
    with pytest.raises(CheckpointError):
        lq.load_quantized(SmallModule, edited(checkpoint[0], edit))


def test_another_class(checkpoint: tuple[Path, SmallModule]) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not fit SmallModule"):
        lq.load_quantized(SmallModule, checkpoint[0], network=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not fit Configured"):
        lq.load_quantized(Configured, checkpoint[0], width=3)


def test_nothing_of_the_file_is_imported(checkpoint: tuple[Path, SmallModule]) -> None:
    def name_a_class(content: dict[str, Any]) -> None:
        manifest_in(content)["inputs"] = {"args": [{"object": "antigravity.fly"}], "kwargs": {}}

    with pytest.raises(CheckpointError, match=r"cannot be created.*example_inputs"):
        lq.load_quantized(SmallModule, edited(checkpoint[0], name_a_class))
    assert "antigravity" not in sys.modules


def test_example_inputs_given(checkpoint: tuple[Path, SmallModule]) -> None:
    from lightning_quant.simulation.inputs import NetworkInputs

    path = edited(checkpoint[0], lambda content: manifest_in(content).pop("inputs"))
    example: Tensor = small_data().tensors[0][:1]
    loaded = lq.load_quantized(SmallModule, path, example_inputs=NetworkInputs((example,)))
    assert loaded.model.calibrated
