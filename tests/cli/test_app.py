"""The command line, run as a user runs it: in a folder of their own, as a process of its own."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest
from filelock import FileLock

from lightning_quant.cli.app import main
from lightning_quant.report.record import RunRecord
from lightning_quant.report.summary import COLUMNS
from tests.helpers.app import QUICK, SMALL, lightning_quant

pytestmark = pytest.mark.slow


def unfinished(run: Path) -> None:
    """Make a finished run look like one that was killed."""
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished sweep over two precisions, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = ["-m", "precision=w8a8,w4a16", "hydra.sweep.dir=multirun/tried", *SMALL]
    return folder, lightning_quant(folder, *arguments, fresh=True)


def test_a_sweep_ends_with_one_table_and_every_artifact(sweep: tuple[Path, str]) -> None:
    folder, output = sweep
    runs = sorted((folder / "multirun/tried").glob("*/results.json"))
    assert [path.parent.name for path in runs] == ["0-ffnet_nano-w8a8", "1-ffnet_nano-w4a16"]
    for path in runs:
        record = RunRecord.read(path)
        assert record.status == "finished"
        assert set(record.metric) == {"float", "ptq", "qat"}
        assert record.exported in ("ptq", "qat")
        assert record.parity is not None
        assert set(record.seconds) == {"data", "float", "ladder", "export"}
        assert [rung.rung for rung in record.ladder.rungs] == ["ptq", "qat"]
        bundle = path.parent / record.artifacts["bundle"]
        name = bundle.name
        assert {file.name for file in (bundle / f"{name}.aimet").iterdir()} == {"model.onnx", "model.encodings"}
        onnx.checker.check_model(onnx.load(bundle / f"{name}.onnx"))
        assert (path.parent / record.artifacts["checkpoint"]).is_file()
        assert [file.name for file in (path.parent / "overlays").glob("*.png")] == ["overlay_0000.png"]
        report = (path.parent / record.artifacts["report"]).read_text()
        assert f"{str(record.precision).upper()} " in report
        assert "float.epochs=1" in report  # how to run it again
        assert all(f'id="{part}"' in report for part in ("pictures", "device", "layers"))
        assert record.bytes["quantized"] < record.bytes["float"] / 2
        device, app = record.device  # the network's own graph, and that of the segmentation task: pixels to classes
        assert device.tier in ("htp_emulator", "onnxruntime")
        assert (device.edged, app.edged, app.size) == (False, True, "app")
        assert all(one.metric.keys() == {"float", "simulation", "device"} for one in record.device)
        assert (path.parent / record.artifacts["device"] / "request.json").is_file()
    with (folder / "multirun/tried/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["precision"] for row in rows] == ["w8a8", "w4a16"]
    assert all(row["miou float"] and row["miou PTQ"] and row["miou exported"] and row["drop"] for row in rows)
    markdown = (folder / "multirun/tried/summary.md").read_text().splitlines()
    # three tables with their heads: of two runs, of both graphs of each on the device, and of the two rungs of each
    assert len([line for line in markdown if line.startswith("|")]) == 3 * 2 + 2 + 2 * 2 + 2 * 2
    assert "On the device" in output
    assert markdown[0].count("|") == len(COLUMNS) + 1
    assert "summary.md" in output
    for path in runs:  # the place of every artifact
        assert all(str(path.parent.relative_to(folder) / place) in output for place in ("results.json", "overlays"))


def test_a_sweep_has_a_report_that_leads_to_those_of_its_runs(sweep: tuple[Path, str]) -> None:
    folder, output = sweep
    page = (folder / "multirun/tried/report.html").read_text()
    assert "Report: multirun/tried/report.html" in output
    for run in ("0-ffnet_nano-w8a8", "1-ffnet_nano-w4a16"):
        assert f'href="{run}/report.html"' in page


def test_a_sweep_trains_the_float_network_once(sweep: tuple[Path, str]) -> None:
    folder, output = sweep
    assert output.count("Float network trained") == 1
    assert output.count("Float network from") == 1
    assert len(list((folder / "outputs/float").glob("*.ckpt"))) == 1


def test_a_sweep_started_again_runs_only_what_is_missing(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    tried = folder / "multirun/tried"
    before = (tried / "0-ffnet_nano-w8a8/results.json").read_bytes()
    (tried / "1-ffnet_nano-w4a16/results.json").write_text('{"format_version": 1, "status"')  # a torn write
    arguments = ["-m", "precision=w8a8,w4a16", "hydra.sweep.dir=multirun/tried", *SMALL, "skip_finished=true"]
    output = lightning_quant(folder, *arguments)
    assert output.count("Skipped:") == 1
    assert (tried / "0-ffnet_nano-w8a8/results.json").read_bytes() == before
    assert RunRecord.read(tried / "1-ffnet_nano-w4a16/results.json").status == "finished"


def test_another_configuration_in_the_same_folder_is_run_again(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    output = lightning_quant(
        folder, "-m", "precision=w8a8", "hydra.sweep.dir=multirun/tried", *SMALL, "qat.epochs=0", "skip_finished=true"
    )
    assert "Skipped:" not in output
    assert "qat" not in RunRecord.read(folder / "multirun/tried/0-ffnet_nano-w8a8/results.json").metric


def test_qat_is_the_same_whether_float_was_trained_before_it_or_reused(sweep: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = sweep
    lightning_quant(folder, *QUICK, "precision=w8a16", "hydra.run.dir=reused")
    lightning_quant(tmp_path, *QUICK, "precision=w8a16", "hydra.run.dir=trained")
    reused, trained = RunRecord.read(folder / "reused/results.json"), RunRecord.read(tmp_path / "trained/results.json")
    assert reused.metric == trained.metric


def test_a_rung_that_suffices_ends_the_climb(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    output = lightning_quant(
        folder, *QUICK, "ladder.rungs=[ptq,cle]", "ladder.max_drop=1", "qat.distillation=0.5", "hydra.run.dir=enough"
    )
    record = RunRecord.read(folder / "enough/results.json")
    assert "No training: val_miou" in output
    assert (record.exported, set(record.metric)) == ("ptq", {"float", "ptq"})
    assert record.ladder.max_drop == 1


def test_without_a_gate_it_always_trains(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    lightning_quant(folder, *QUICK, "ladder=none", "ladder.max_drop=null", "hydra.run.dir=none")
    record = RunRecord.read(folder / "none/results.json")
    assert (record.exported, set(record.metric), record.ladder.rungs) == ("qat", {"float", "qat"}, [])


def test_a_killed_run_resumes_where_it_stopped(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    arguments = [
        *QUICK,
        "ladder.rungs=[ptq,bias_correction]",
        "qat.epochs=0",
        "precision=w8a16",
        "hydra.run.dir=killed",
    ]
    lightning_quant(folder, *arguments)
    path = folder / "killed/results.json"
    whole = RunRecord.read(path)
    unfinished(folder / "killed")
    output = lightning_quant(folder, *arguments, "skip_finished=true")
    assert "Resuming from" in output
    assert "Rung ptq" not in output
    again = RunRecord.read(path)
    assert again.status == "finished"
    assert again.metric == whole.metric


def test_a_damaged_file_to_resume_from_is_named(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    arguments = [*QUICK, "hydra.run.dir=damaged", "skip_finished=true"]
    lightning_quant(folder, *arguments)
    unfinished(folder / "damaged")
    (folder / "damaged/ladder.part").write_bytes(b"PK half of a checkpoint")
    output = lightning_quant(folder, *arguments, status=1)
    assert re.search(r"CheckpointError: .*damaged/ladder\.part is not a readable checkpoint", output)


def test_a_second_run_in_the_same_folder_is_refused(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    (folder / "taken").mkdir()
    with FileLock(folder / "taken/.lock"):
        output = lightning_quant(folder, *SMALL, "hydra.run.dir=taken", status=1)
    assert re.search(r"ConfigurationError: Another run is writing to .*/taken: expected a folder for each", output)
    assert "Traceback" not in output
    assert not (folder / "taken/results.json").exists()


def test_a_device_that_cannot_run_it_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    arguments = ["precision=w8a16", "target=htp_emulator", "target.device=Samsung Galaxy S21", "hydra.run.dir=out"]
    output = lightning_quant(tmp_path, *SMALL, *arguments, status=1)
    assert "ConfigurationError: w8a16 on Samsung Galaxy S21: expected a chip with 16-bit activations" in output
    assert RunRecord.read(tmp_path / "out/results.json").seconds == {}
    assert not (tmp_path / "outputs/float").exists()


def test_tables_of_a_run_that_was_stopped_are_kept(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    arguments = [*QUICK, "hydra.run.dir=tables", "precision=w8a16", "skip_finished=true"]
    lightning_quant(folder, *arguments)
    unfinished(folder / "tables")
    table = (folder / "tables/logs/ladder/metrics.csv").read_text()
    output = lightning_quant(folder, *arguments)
    assert "exists and is not empty" not in output
    assert (folder / "tables/logs/ladder/metrics.1.csv").read_text() == table


def test_sensitivity_draws_and_keeps_nothing(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    output = lightning_quant(folder, "sensitivity", *QUICK, "precision=w4a8", "hydra.run.dir=sensitive")
    assert "worst first" in output
    assert {path.name for path in (folder / "sensitive").iterdir()} >= {"sensitivity.png", "sensitivity.csv"}
    assert not (folder / "sensitive/export").exists()
    with (folder / "sensitive/sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    ratios = [float(row["sqnr_db"]) for row in rows]
    assert ratios == sorted(ratios)
    assert {row["part"] for row in rows} == {"weights", "activations"}
    assert sum(float(row["share"]) for row in rows if row["part"] == "weights") == pytest.approx(1, abs=1e-3)


def test_a_float_checkpoint_takes_the_place_of_training(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    (checkpoint,) = (folder / "outputs/float").glob("*.ckpt")
    output = lightning_quant(folder, *QUICK, f"float.checkpoint={checkpoint}", "qat.epochs=0", "hydra.run.dir=given")
    assert "Float network trained" not in output
    given = RunRecord.read(folder / "given/results.json").metric["float"]
    swept = RunRecord.read(folder / "multirun/tried/1-ffnet_nano-w4a16/results.json").metric["float"]
    assert given == swept


def test_photographs_and_a_network_by_target(camvid: Path, tmp_path: Path) -> None:
    arguments = [
        "data=cityscapes",
        f"data.root={camvid}",
        "data.size=[48,64]",
        "data.batch_size=64",
        "model=lraspp_mobilenet_v3",
        "precision=w8a16",
        "float.epochs=0",
        "qat.epochs=0",
        "quantizer.calibration_samples=16",
        "hydra.run.dir=out",
    ]
    lightning_quant(tmp_path, *arguments)
    record = RunRecord.read(tmp_path / "out/results.json")
    assert (record.model, record.data, record.status) == ("lraspp_mobilenet_v3", "cityscapes", "finished")
    assert len(list((tmp_path / "out/overlays").glob("*.png"))) == 4


OWN = """
from lightning import LightningDataModule, LightningModule
from lightning_quant import Comparison
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 3, 16, 32), torch.arange(8) % 3), 4)

    val_dataloader = train_dataloader


class Task(LightningModule):
    def __init__(self, network, learning_rate=0.1):
        super().__init__()
        self.model, self.learning_rate = network, learning_rate

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def draw_comparison(self, float_output, quantized_output, images):
        bars = [(255 * one.softmax(1)[0, :, None].expand(3, 9)).byte() for one in (float_output, quantized_output)]
        return Comparison(*bars, legend={"pear": (0, 160, 0)})

    def class_figures(self):
        return {"recall": {"apple": 0.5, "pear": 0.25, "plum": float("nan")}}
"""


def test_a_task_of_the_users_own_is_drawn_and_has_a_table_of_classes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "conf").mkdir()
    for group, target in {"data": "Data", "model": "network", "task": "Task"}.items():
        (tmp_path / "conf" / group).mkdir()
        (tmp_path / f"conf/{group}/own.yaml").write_text(f"_target_: mine.{target}\n")
    arguments = ["--config-dir", "conf", "data=own", "model=own", "task=own", "monitor=val_loss", "mode=min"]
    arguments += ["float.epochs=1", "qat.epochs=1", "ladder.max_drop=-1", "ladder.rungs=[ptq]", "overlays=2"]
    arguments += ["quantizer.calibration_samples=8", "target=none", "hydra.run.dir=out"]
    lightning_quant(tmp_path, *arguments, fresh=True)
    record = RunRecord.read(tmp_path / "out/results.json")
    figures = {"recall": {"apple": 0.5, "pear": 0.25}}
    assert record.class_figures == {"float": figures, record.exported: figures}
    assert record.legend == {"pear": "#00a000"}
    assert [path.name for path in sorted((tmp_path / "out/overlays").glob("*.png"))] == [
        "overlay_0000.png",
        "overlay_0001.png",
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('class="comparison"') == 2
    assert "recall of each class" in page
    assert "Cityscapes" not in page


def test_a_classifier_of_drawn_shapes(tmp_path: Path) -> None:
    arguments = ["experiment=classification_demo", "data.train=48", "data.val=24", "data.size=32", "float.epochs=1"]
    arguments += ["qat.epochs=0", "ladder.rungs=[ptq]", "ladder.max_drop=1", "quantizer.calibration_samples=12"]
    arguments += ["report.samples=0", "overlays=2", "target=onnxruntime", "target.samples=6", "hydra.run.dir=out"]
    lightning_quant(tmp_path, *arguments, "trainer.enable_progress_bar=false")
    record = RunRecord.read(tmp_path / "out/results.json")
    assert (record.status, record.monitor, record.exported) == ("finished", "val_acc", "ptq")
    shapes = ("circle", "cross", "ring", "square", "star", "triangle")
    for rung in ("float", "ptq"):
        found = record.confusion[rung]
        assert found.classes == shapes
        assert [sum(row) for row in found.counts] == [4] * 6
        assert sum(row[index] for index, row in enumerate(found.counts)) / 24 == pytest.approx(record.metric[rung])
    assert [app.edged for app in record.device] == [False, True]
    classes = json.loads((tmp_path / "out" / record.artifacts["bundle"] / "io.json").read_text())["classes"]
    assert tuple(one["name"] for one in classes) == shapes
    page = (tmp_path / "out/report.html").read_text()
    assert "Confusion of classes" in page
    assert page.count('class="comparison"') == 2


def test_version_is_the_packages_own(tmp_path: Path) -> None:
    assert lightning_quant(tmp_path, "--version") == f"lightning-quant {version('lightning-quant')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["task=classification", "model=resnet10", "data=shapes", "data.train=32", "data.val=6"],
            "ConfigurationError.*6 classes.*task.num_classes",
        ),
        (["task=classification", "data=image_folder", "data.root=nowhere"], "DataError.*nowhere"),
        (["data=cityscapes", "data.root=nowhere"], "DataError.*nowhere"),
        (["data=cityscapes"], "ConfigurationError.*data.root"),
        ([*SMALL, "float.checkpoint=missing.ckpt"], "CheckpointError.*missing.ckpt"),
        (["qat.epochs=abc"], "ConfigurationError.*qat.epochs='abc'"),
        ([*SMALL, "monitor=val_mouse", "float.epochs=0"], "ConfigurationError.*val_mouse.*val_miou"),
        (["quantizer.hardware=htp_v57"], "ConfigurationError.*htp_v57"),
        (["ladder.rungs=[ptq,seqmse]"], "ConfigurationError.*Unknown rung 'seqmse'.*seq_mse"),
        ([*SMALL, "target.target=iphone"], "ConfigurationError.*Unknown target 'iphone'.*htp_emulator"),
        (
            ["predikt", "bundle"],
            "ConfigurationError: Unknown command 'predikt': .*Did you mean predict?",
        ),
        (["job=dance"], "ConfigurationError.*job='dance': expected one of quantize, sensitivity"),
    ],
)
def test_bad_input_ends_with_one_clear_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    output = lightning_quant(tmp_path, *arguments, "hydra.run.dir=out", status=1)
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if "Error: " in line)
    assert re.search(message, line), line
    if (tmp_path / "out/results.json").is_file():
        record = json.loads((tmp_path / "out/results.json").read_text())
        assert record["status"] == "failed"
        assert record["error"]


def test_a_run_that_an_error_of_the_users_code_ended_is_recorded_as_failed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Task:\n    def __init__(self, **options):\n        raise KeyError('lost')\n"
    )
    output = lightning_quant(tmp_path, *SMALL, "task._target_=mine.Task", "hydra.run.dir=out", status=1)
    assert "KeyError('lost')" in output
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["status"] == "failed"
    assert "lost" in record["error"]


def test_an_unknown_precision_is_answered_by_those_that_exist(tmp_path: Path) -> None:
    output = lightning_quant(tmp_path, "precision=w3a7", status=1)
    assert "w3a7" in output
    assert "w4a16" in output


def test_a_failed_job_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    output = lightning_quant(
        tmp_path,
        "-m",
        "quantizer.hardware=htp_v57,htp_v73",
        "hydra.sweep.dir=m",
        *QUICK,
        "float.epochs=0",
        "qat.epochs=0",
        status=1,
    )
    states = [RunRecord.read(path).status for path in sorted((tmp_path / "m").glob("*/results.json"))]
    assert states == ["failed", "finished"]
    assert "2 runs" in output


def test_help_names_the_choices_without_loading_torch(tmp_path: Path) -> None:
    output = lightning_quant(tmp_path, "--help", fresh=True)
    assert "precision: w4a16, w4a8, w8a16, w8a8" in output
    assert all(f"lightning-quant {name} " in output for name in ("blame", "compare", "predict", "resume"))
    code = (
        "import sys; sys.argv = ['lightning-quant', '--cfg', 'job']\n"
        "from lightning_quant.cli.app import main; main()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["blame", "compare", "predict", "resume"])
def test_every_command_has_its_own_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, status in ((["--help"], 0), (["a", "--unknown"], 2)):
        monkeypatch.setattr("sys.argv", ["lightning-quant", name, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: lightning-quant {name} [-h]")
    assert "unrecognized arguments: --unknown" in said.err or "required: " in said.err


@pytest.mark.parametrize("arguments", [[], ["."], ["inner"]])
def test_resume_where_nothing_was_sent(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-quant", "resume", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "was sent to a device" in caplog.text


def test_float_is_measured_as_the_16_bit_activations_are(tmp_path: Path) -> None:
    options = ["precision=w8a16", "trainer.precision=bf16-mixed", "monitor=val_loss", "mode=min", "float.epochs=0"]
    lightning_quant(tmp_path, *QUICK, *options, "qat.epochs=0", "hydra.run.dir=out")
    record = RunRecord.read(tmp_path / "out/results.json")
    assert record.ladder is not None
    assert record.metric["float"] == record.ladder.float_metric


def test_blame_compares_the_file_of_a_run_with_its_simulation(sweep: tuple[Path, str]) -> None:
    folder, _ = sweep
    run = folder / "multirun/tried/0-ffnet_nano-w8a8"
    output = lightning_quant(folder, "blame", str(run))
    assert "Every layer computes what the simulation computes" in output
    assert output.count("Quantized SegmentationTask.model") == 1
    assert "LeafSpec" not in output
    found = json.loads((run / "blame.json").read_text())
    assert len(found["file"]["layers"]) > 20
    assert found["file"]["observed_runs"]
    assert len(found["float"]["layers"]) > 20
    bundle = run / RunRecord.read(run / "results.json").artifacts["bundle"]
    assert lightning_quant(folder, "blame", str(bundle)) == output
    assert "is neither a run of lightning-quant nor a bundle in one" in lightning_quant(
        folder, "blame", str(folder), status=1, fresh=True
    )
