"""The real LightningCLI: readable help, callbacks by class path, a saved configuration that gives the same run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_quant as lq

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from tests.helpers.small import SmallModule, small_loader
from lightning_quant.ladder.rungs.cle import CrossLayerEqualization


class MyRung(CrossLayerEqualization):
    '''A rung of one's own.'''
    name = "mine"


class Data(LightningDataModule):
    def train_dataloader(self):
        return small_loader()

    val_dataloader = train_dataloader


class Mine(SmallModule):
    def __init__(self):
        super().__init__()


if __name__ == "__main__":
    LightningCLI(Mine, Data, seed_everything_default=1)
"""
CONFIG: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "lightning_quant.QuantizationAwareTraining",
                "init_args": {
                    "precision": "w4a8",
                    "overrides": {"head": "w8a16"},
                    "max_drop": -1.0,
                    "monitor": "val_loss",
                    "mode": "min",
                    "rungs": ["ptq", {"mixed": {"budget": 0.5}}, "program.MyRung"],
                },
            },
            {"class_path": "lightning_quant.DeviceExport", "init_args": {"target": "onnxruntime", "name": "net"}},
        ],
    }
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def program(folder: Path, *arguments: str, status: int = 0) -> str:
    """Run the program; its terminal output."""
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:.", "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == status, output[-4000:]
    return output


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("PostTrainingQuantization", marks=pytest.mark.torture),  # has no argument that the next lacks
        "QuantizationAwareTraining",
        pytest.param("DeviceExport", marks=pytest.mark.torture),
    ],
)
def test_help_explains_every_argument(folder: Path, name: str) -> None:
    output = program(folder, "fit", f"--trainer.callbacks.help=lightning_quant.{name}")
    for argument, parameter in inspect.signature(getattr(lq, name)).parameters.items():
        entry = re.search(rf"^  --trainer\.callbacks\.{argument} .*?(?=^  --|\Z)", output, re.DOTALL | re.MULTILINE)
        assert entry, argument
        text = " ".join(entry[0].split())
        description = re.search(r"[A-Z_}\]] ([a-z`][^(]{15,}.*)\(type: ", text)
        assert description, text
        assert "see there" not in text
        assert ":class:" not in text
        default = parameter.default
        shown = "null" if default is None else str(default)
        assert re.search(rf"default: {re.escape(shown)}[,)]", text), text  # known subclasses may follow
    assert "(required" not in output


def test_a_saved_configuration_gives_the_same_run(folder: Path) -> None:
    first = program(folder, "fit", "--config", "config.yaml")
    assert "Rung mine: " in first
    assert "Rung mixed: " in first
    run = folder / "lightning_logs/version_0"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    quantization = saved["trainer"]["callbacks"][0]["init_args"]
    given = CONFIG["trainer"]["callbacks"][0]["init_args"]
    *rungs, mine = given["rungs"]
    expected = given | {"rungs": [*rungs, {"class_path": mine}]}  # jsonargparse knows that it is a class
    assert {name: quantization[name] for name in given} == expected
    program(folder, "fit", "--config", str(run / "config.yaml"))
    other = folder / "lightning_logs/version_1"
    for name in ("export/net/manifest.json", "export/net/net.onnx", "export/net/net.aimet/model.encodings"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    states = [torch.load(one / "ladder/best.ckpt", weights_only=True)["state_dict"] for one in (run, other)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items() if torch.is_tensor(value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.callbacks.precision", "w3a8"], r"w3a8"),
        pytest.param(["--trainer.callbacks.max_drop", "much"], r"max_drop", marks=pytest.mark.torture),
        (["--trainer.callbacks.presision", "w8a8"], r"presision"),
    ],
)
def test_a_wrong_value_is_refused_by_name(folder: Path, arguments: list[str], message: str) -> None:
    chosen = ["--trainer.callbacks", "lightning_quant.QuantizationAwareTraining"]
    output = program(folder, "fit", *chosen, *arguments, status=2 if arguments[1] != "w3a8" else 1)
    assert re.search(message, output.splitlines()[-1] + output[-1500:])
