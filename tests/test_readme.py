"""README's commands and Python, run as they stand there (made small by overrides at the end)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_quant.domains.segmentation.datamodule import SyntheticScenesDataModule
from lightning_quant.domains.segmentation.ffnet import ffnet_nano
from lightning_quant.domains.segmentation.task import SegmentationTask
from tests.callbacks.rung_cases import Case, fit_case
from tests.helpers.app import SMALL, lightning_quant

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", README, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


class MyModule(SegmentationTask):
    """A module that builds its own network, as a user's does."""

    def __init__(self) -> None:
        super().__init__(ffnet_nano())


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("lightning-quant")])
def test_readme_command(command: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments = command.split()[1:]
    if arguments != ["--help"]:
        scenes = "data=cityscapes" not in arguments
        small = [value for value in SMALL if scenes or not value.startswith("data.")]
        if not scenes:
            camvid = request.getfixturevalue("camvid")
            arguments = [value.replace("../shared/data/camvid", str(camvid)) for value in arguments]
            small += ["data.size=[48,64]", "data.batch_size=64"]
        arguments += small
    output = lightning_quant(tmp_path, *arguments)
    assert ("worst first" if "sensitivity" in arguments else "precision") in output


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_readme_make_target_exists_and_installs_first(command: str) -> None:
    # Not run: this test runs inside `make test`. Continuous integration runs that, a person `make demo`.
    done = subprocess.run(
        [*command.split(), "--dry-run", "VENV=.venv-none"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install" in done.stdout
    assert re.search(r"pytest|lightning-quant -m", done.stdout)


def test_the_demo_runs_the_command_of_the_sweep(tmp_path: Path) -> None:
    done = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if "lightning-quant" in line and "pip" not in line)
    lightning_quant(tmp_path, *line.split()[1:], *SMALL)
    assert (tmp_path / "multirun/demo/summary.md").is_file()


def test_the_rung_of_the_docs_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/ladder.md").read_text(), re.DOTALL)
        if block.startswith("# my_rungs.py")
    )
    (tmp_path / "my_rungs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    case = Case(lambda network: None, "w4a16", -100.0, ("ptq", "my_rungs.WiderWeights"))
    callback, _ = fit_case(case, tmp_path, max_epochs=0)
    assert [rung.rung for rung in callback.result.rungs] == ["ptq", "wider_weights"]
    assert callback.result.rungs[1].changed == "weight ranges 1.05 times as wide"


def test_readme_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def table(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, its head first."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip(" *") for cell in line.split("|")] for line in lines if set(line) - set("|- ")]


def test_readme_results_are_those_of_the_benchmark() -> None:
    head, *cells = table((ROOT / "benchmarks/results/accuracy/table.md").read_text())
    measured = {}
    for row in (dict(zip(head, one, strict=True)) for one in cells):
        if (row["data"], row[""]) == ("camvid", "w4a16"):
            ptq, plain = re.findall(r"[\d.]+", row["ptq"]), re.findall(r"[\d.]+", row["plain QAT"])
            measured[row["network"]] = [row["float"], ptq[0], row["mIoU"], row["after s"], plain[0], plain[-1]]
    shown = {name.lower().removesuffix("-mobilenetv3").replace("-", "_"): row for name, *row in table(README)[1:]}
    assert shown == measured


def test_readme_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = SyntheticScenesDataModule("scenes", train=16, val=8, height=64, width=128, calibration_samples=8)
    names = {"module": MyModule(), "data": data}
    assert README.count("```python") == len(BLOCKS) == 4
    exec(BLOCKS["trainer"], names)
    trainer = names["trainer"]
    assert isinstance(trainer, pl.Trainer)
    assert (tmp_path / "export/FFNet-w8a8/manifest.json").is_file()
    trainer.save_checkpoint("last.ckpt")
    exec(BLOCKS["load"], names)
    assert "val_miou" in trainer.callback_metrics
    names["float_module"] = MyModule()
    exec(BLOCKS["ladder"], names)
    assert names["quantization"].result.best is not None  # type: ignore[attr-defined]
    names["float_module"] = MyModule()
    exec(BLOCKS["device"], names)
    (report,) = names["export"].reports  # type: ignore[attr-defined]
    assert report.metric.keys() == {"float", "simulation", "device"}
