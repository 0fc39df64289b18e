"""Each network on the NPU's emulator: the table of `make devices`.

The float networks are those of `make accuracy`; each is calibrated as it is (rung ``ptq``), exported and compiled for
the chip of a Galaxy S24, and 20 validation photographs are computed by float network, simulation and emulator.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

import lightning_quant as lq
from benchmarks.accuracy import data, float_task, trainer
from benchmarks.networks import NETWORKS
from lightning_quant.deploy.device_report import DeviceReport
from lightning_quant.deploy.parity import Parity

RESULTS = Path(__file__).parent / "results" / "devices"
PRECISIONS = ("w8a8", "w8a16", "w4a16")
SAMPLES = 20


def measure(name: str, precision: str, camvid: str, device: str) -> None:
    """Calibrate, export and emulate; the report is kept as JSON."""
    path = RESULTS / f"{name}-{precision}.json"
    if path.is_file():
        return
    task = copy.deepcopy(float_task(name, "camvid", camvid))
    export = lq.DeviceExport(
        "outputs/devices", target="htp_emulator", device=device, samples=SAMPLES, name=f"{name}-{precision}",
        monitor="val_miou", on_failure="raise",
    )  # fmt: skip
    quantization = lq.PostTrainingQuantization(precision, calibration_samples=64)
    trainer(quantization, export, limit_val_batches=1).validate(task, datamodule=data("camvid", camvid), verbose=False)
    assert export.bundle is not None
    _file_path(name, precision).write_text(json.dumps(export.bundle.manifest.parity.to_dict()))
    export.reports[0].write(path)


def _file_path(name: str, precision: str) -> Path:
    """Where the agreement of the exported file with the simulation, in ONNX Runtime, is kept."""
    return RESULTS / f"{name}-{precision}-file.json"


def table() -> str:
    """Return the reports that are there, as Markdown."""
    heads = [
        "network",
        "",
        "file to simulation",
        "emulator to simulation",
        "to float",
        "same class as float",
        "mIoU float",
        "simulated",
        "emulated",
    ]
    heads += ["layers on the NPU", "in float", "on the CPU", "MB float", "QDQ", "compiled"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in NETWORKS:
        for precision in PRECISIONS:
            path = RESULTS / f"{name}-{precision}.json"
            if not path.is_file():
                continue
            report = DeviceReport.read(path)
            assert report.against_simulation is not None
            assert report.against_float is not None
            assert report.layers is not None
            file = _file_path(name, precision)
            of_file = str(Parity.from_json(json.loads(file.read_text()))) if file.is_file() else ""
            figures = [of_file, f"{report.against_simulation.psnr_db:.1f} dB", f"{report.against_float.psnr_db:.1f} dB"]
            assert report.against_float.argmax_agreement is not None
            figures.append(f"{100 * report.against_float.argmax_agreement:.1f} %")
            figures += [f"{100 * report.metric[what]:.1f}" for what in ("float", "simulation", "device")]
            figures += [str(len(names)) for names in (report.layers["NPU"], report.float_islands, report.fallen_back)]  # type: ignore[arg-type]
            figures += [f"{report.bytes[what] / 1e6:.2f}" for what in ("float", "quantized", "compiled")]
            rows.append("| " + " | ".join([name, precision.upper(), *figures]) + " |")
    return "\n".join(rows)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--device", default="Samsung Galaxy S24")
    arguments = parser.parse_args()
    for name in arguments.networks:
        for precision in PRECISIONS:
            measure(name, precision, arguments.camvid, arguments.device)
    Console(width=200).print(Markdown(text := table()))
    (RESULTS / "table.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
