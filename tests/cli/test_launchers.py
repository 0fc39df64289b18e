"""Sweeps through other launchers than Hydra's own: the same folders, the same table, the same exit status."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from lightning_quant.report.record import RunRecord
from tests.helpers.app import QUICK, lightning_quant

pytestmark = pytest.mark.slow

# Nothing but what a launcher could get wrong.
UNTRAINED = [*QUICK, "qat.epochs=0"]
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "ray": [
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
}


def needs(plugin: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    return pytest.mark.skipif(not found, reason=f"needs {plugin}: pip install 'lightning-quant[launchers]'")


def sweep(folder: Path, launcher: str, *arguments: str, status: int = 0) -> str:
    chosen = [*LAUNCHERS[launcher], "precision=w8a8,w4a8", "hydra.sweep.dir=sweep", *arguments]
    return lightning_quant(folder, "-m", *UNTRAINED, *chosen, status=status, fresh=True)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=needs("hydra_joblib_launcher")),
        pytest.param("ray", marks=[needs("hydra_ray_launcher"), pytest.mark.torture]),
        pytest.param("submitit", marks=[needs("hydra_submitit_launcher"), pytest.mark.torture]),
    ],
)
def test_a_sweep_gathers_its_runs_whatever_launched_them(tmp_path: Path, launcher: str) -> None:
    output = sweep(tmp_path, launcher)
    runs = [tmp_path / "sweep" / name for name in ("0-ffnet_nano-w8a8", "1-ffnet_nano-w4a8")]
    records = [RunRecord.read(run / "results.json") for run in runs]
    assert [(record.status, str(record.precision)) for record in records] == [
        ("finished", "w8a8"),
        ("finished", "w4a8"),
    ]
    assert all(
        (run / record.artifacts["bundle"] / "manifest.json").is_file()
        for run, record in zip(runs, records, strict=True)
    )
    with (tmp_path / "sweep/summary.csv").open() as file:
        assert [row["precision"] for row in csv.DictReader(file)] == ["w8a8", "w4a8"]
    assert (tmp_path / "sweep/report.html").is_file()
    assert "2 runs in sweep" in output
    # the jobs ran side by side, and one of them trained for both
    assert len(list((tmp_path / "outputs/float").glob("*.ckpt"))) == 1
    assert records[0].metric["float"] == records[1].metric["float"]
    assert len(list(runs[0].parent.glob("*-ffnet_nano-*/logs/float"))) == 1


@needs("hydra_joblib_launcher")
def test_a_job_that_fails_in_another_process_costs_no_other(tmp_path: Path) -> None:
    output = sweep(tmp_path, "joblib", "ladder.max_drop=-10,oops", status=1)
    records = [RunRecord.read(path) for path in sorted((tmp_path / "sweep").glob("*/results.json"))]
    assert sorted(record.status for record in records) == ["failed", "failed", "finished", "finished"]
    assert "max_drop='oops'" in output
    assert "4 runs in sweep" in output


@needs("hydra_optuna_sweeper")
def test_optuna_searches_overrides_under_a_budget(tmp_path: Path) -> None:
    arguments = ["experiment=search", "precision=w4a8", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=search"]
    small = [one for one in UNTRAINED if not one.startswith(("target", "ladder", "qat", "overlays"))]
    output = lightning_quant(tmp_path, "-m", *small, *arguments)
    records = [RunRecord.read(path) for path in sorted((tmp_path / "search").glob("*/results.json"))]
    assert [record.status for record in records] == ["finished"] * 3
    assert "3 runs in search" in output
    found = yaml.safe_load((tmp_path / "search/optimization_results.yaml").read_text())
    tried = [(record.drop, record.bytes["quantized"] / 1e6) for record in records]
    assert all(tuple(one["values"]) in tried for one in found["solutions"])
    searched = {record.config["quantizer"]["range_estimator"] for record in records}
    assert len(searched) > 1 or len({str(record.config["quantizer"]["overrides"]) for record in records}) > 1


@needs("hydra_optuna_sweeper")
def test_a_trial_that_fails_costs_optuna_no_other(tmp_path: Path) -> None:
    arguments = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1"]
    arguments += ["hydra.sweeper.sampler.seed=1", "hydra.sweeper.direction=minimize", "hydra.sweep.dir=search"]
    small = [one for one in UNTRAINED if not one.startswith("ladder.max_drop")]
    output = lightning_quant(tmp_path, "-m", *small, *arguments, "ladder.max_drop=choice(0.5,oops)", status=1)
    records = [RunRecord.read(path) for path in sorted((tmp_path / "search").glob("*/results.json"))]
    assert {record.status for record in records} == {"finished", "failed"}
    assert "max_drop='oops'" in output
    best = yaml.safe_load((tmp_path / "search/optimization_results.yaml").read_text())
    assert best["best_params"] == {"ladder.max_drop": 0.5}


def test_an_unknown_objective_is_refused(tmp_path: Path) -> None:
    output = lightning_quant(tmp_path, *UNTRAINED, "objectives=[speed]", status=1)
    assert "objectives has 'speed': expected some of metric, drop, megabytes, latency_ms, seconds" in output


APP = """
import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from tests.helpers.small import SmallModule, small_loader
import lightning_quant as lq

@hydra.main(config_path="own", config_name="config", version_base="1.3")
def main(config):
    quantization = lq.PostTrainingQuantization(config.precision, **config.quantizer)
    export = instantiate(config.target, dirpath="export", name="net", report=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[quantization, export])
    trainer.fit(SmallModule(), small_loader(), small_loader())
    print(config.model.name, export.bundle.manifest.precision, export.bundle.manifest.range_estimator)

main()
"""


def test_the_config_groups_serve_other_apps(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    own = tmp_path / "own"
    (own / "model").mkdir(parents=True)
    defaults = ["_self_", {"model": "ffnet_nano"}, {"precision": "w8a8"}, {"quantizer": "min_max"}, {"target": "none"}]
    OmegaConf.save({"defaults": defaults}, own / "config.yaml")
    OmegaConf.save({"name": "mine"}, own / "model" / "ffnet_nano.yaml")  # a name that this package has as well
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "app.py", "precision=w4a16", "quantizer=tf_enhanced", "quantizer.statistics_cache=null"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^mine w4a16 tf_enhanced$", done.stdout, re.MULTILINE)


def test_its_own_app_knows_its_groups_once(tmp_path: Path) -> None:
    output = lightning_quant(tmp_path, "--info", "searchpath")
    assert output.count("/conf ") == 1
