"""The examples run as they stand, each in an empty folder."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models import get_model

from lightning_quant import read_manifest
from lightning_quant.domains.classification.shapes import draw_shapes
from lightning_quant.domains.segmentation.images import find_images
from lightning_quant.domains.segmentation.scenes import generate_scenes
from lightning_quant.report.record import RunRecord

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LONG = {"quantization_basics"}


def run(folder: Path, name: str, *arguments: str) -> str:
    """Run an example in ``folder``; its terminal output."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        # one thread, wide tables, and not on anybody's AI Hub account
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "QAIHUB_CLIENT_INI": str(folder / "none.ini")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern: str, output: str) -> float:
    """The number in the one place of ``output`` where ``pattern`` fits."""
    (found,) = re.findall(pattern, output)
    return float(found)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_tested_and_short(example: Path) -> None:
    assert f"test_{example.stem}" in globals()
    assert example.stem in LONG or len(example.read_text().splitlines()) < 60


def test_quantization_basics(tmp_path: Path) -> None:
    output = run(tmp_path, "quantization_basics.py")
    assert "round(12.5 / 2.35) + 0 = 5; back: (5 - 0) * 2.35 = 11.75" in output
    assert "The error is 0.75" in output
    assert "36864 bytes become 9216, 4x smaller" in output
    assert "36864 bytes become 4608, 8x smaller" in output
    assert number(r"4 bits: 16 values are left, the largest error is (\S+)", output) == pytest.approx(1 / 30, rel=0.01)
    assert number(r"8 bits: 256 values are left, the largest error is (\S+)", output) == pytest.approx(
        1 / 510, rel=0.01
    )
    snr = {
        row[0]: [float(value) for value in row[1:]] for row in re.findall(r"(W\dA\d+) +(\S+) +(\S+) +(\S+)\n", output)
    }
    assert snr["W8A8"][0] == snr["W8A16"][0] > snr["W4A16"][0] + 4 * 5  # 4 bits of about 6 dB
    assert snr["W8A16"][1] == snr["W4A16"][1] > snr["W8A8"][1] + 8 * 5
    assert snr["W8A16"][2] > snr["W8A8"][2] > snr["W4A16"][2]
    pictures = sorted((tmp_path / "outputs/quantization_basics").iterdir())
    assert [path.name[0] for path in pictures] == ["1", "2", "3", "4"]
    for path in pictures:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10  # something is drawn


def test_add_a_callback(tmp_path: Path) -> None:
    output = run(tmp_path, "add_a_callback.py")
    assert number(r"accuracy of the reloaded 4-bit network: (\S+)", output) > 0.8
    assert (tmp_path / "export/classifier/classifier.aimet/model.encodings").is_file()


def test_ptq_of_a_pretrained_network(tmp_path: Path) -> None:
    # Nothing is downloaded here. Statistics of real images make up for the training: without them, all of an
    # untrained MobileNetV2's outputs are nearly zero, and rounding decides.
    torch.manual_seed(0)
    network = get_model("mobilenet_v2", weights=None)
    photos = generate_scenes(tmp_path / "photos", train=32, val=0, height=96, width=96) / "leftImg8bit"
    with torch.no_grad():
        for _ in range(20):
            network(torch.stack(list(find_images(str(photos), size=(224, 224)))[::2]))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    output = run(tmp_path, "ptq_of_a_pretrained_network.py", "--weights", "weights.pth", "--images", str(photos))
    assert "of 16 images have the same class" in output
    assert number(r"(\S+)% of 16 images", output) > 50
    assert (tmp_path / "export/mobilenet_v2/mobilenet_v2.onnx").is_file()


def test_qat_with_the_gate(tmp_path: Path) -> None:
    output = run(tmp_path, "qat_with_the_gate.py")
    drops = {rung: float(drop) for rung, drop in re.findall(r"^(\w+) +\d\.\d{4} +(-?\d\.\d{4}) ", output, re.MULTILINE)}
    (taken,) = re.findall(r"taken: (\w+); within max_drop: True", output)
    assert drops[taken] == min(drops.values()) <= 0.005
    assert "qat" not in drops  # a repair was enough
    (checkpoint,) = re.findall(r"checkpoint: (.+)", output)
    assert read_manifest(checkpoint)["precision"] == "w4a8"


def test_classification(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "shapes", train=48, val=12, size=32)
    arguments = ["--images", "shapes", "--network", "squeezenet1_1", "--epochs", "1"]  # ResNet-18 takes much longer
    output = run(tmp_path, "classification.py", *arguments)
    in_float, quantized = (number(pattern, output) for pattern in (r"float (\S+), ", r"w8a8 after \w+ (\S+)"))
    assert in_float - quantized <= 0.01
    assert (tmp_path / "export/squeezenet1_1/squeezenet1_1.app.onnx").is_file()
    record = RunRecord.read(tmp_path / "export/squeezenet1_1.report/results.json")
    (confusion,) = record.confusion.values()
    assert (len(confusion.classes), sum(map(sum, confusion.counts))) == (6, 12)


def test_hydra_sweep(tmp_path: Path) -> None:
    output = run(tmp_path, "hydra_sweep.py")
    with (tmp_path / "multirun/example/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["precision"] for row in rows] == ["w8a8", "w8a16", "w4a16"]
    assert re.search(r"smallest: w4a16, 0\.2\d MB, mIoU 0\.\d+", output)
    assert "| ffnet_nano | w8a16 |" in output


def test_dict_outputs(tmp_path: Path) -> None:
    output = run(tmp_path, "dict_outputs.py")
    assert "answers: {'brake': (4, 2), 'steer': (4, 1)}" in output
    (losses,) = re.findall(r"loss in float: (\S+), at W8A8: (\S+)", output)
    in_float, quantized = map(float, losses)
    assert in_float < 0.6  # chance is 0.69 and more
    assert quantized == pytest.approx(in_float, abs=0.05)
    assert quantized != in_float
    assert (tmp_path / "export/SpeedAndSteering-w8a8/manifest.json").is_file()


def test_detection(tmp_path: Path) -> None:
    output = run(tmp_path, "detection.py")
    (figures,) = re.findall(r"val_map50 in float: (\S+), at W8A8: (\S+)", output)
    in_float, quantized = map(float, figures)
    assert in_float > 0.05  # untrained it is 0
    assert quantized == pytest.approx(in_float, abs=0.05)
    assert number(r"average precision of car: (\S+)", output) > 0.02
    assert (tmp_path / "export/detector/manifest.json").is_file()
    assert list((tmp_path / "export/detector.report/overlays").glob("*.png"))


def test_lightning_cli(tmp_path: Path) -> None:
    run(tmp_path, "lightning_cli.py", "fit", "--trainer.max_epochs", "2")
    (weights,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    config = EXAMPLES / "lightning_cli.yaml"
    given = ["--config", str(config), "--model.network.init_args.weights", str(weights)]
    output = run(tmp_path, "lightning_cli.py", "validate", *given)
    assert number(r"val_miou\D+(\d\.\d+)", output) > 0.05
    manifest = json.loads((tmp_path / "export/from_config/manifest.json").read_text())
    assert manifest["precision"] == "w8a8"


def test_push_to_ai_hub(tmp_path: Path) -> None:
    output = run(tmp_path, "push_to_ai_hub.py")
    report = json.loads(output[output.index("\n{\n") :])
    assert report["tier"] in ("htp_emulator", "onnxruntime")
    assert report["against_float"]["psnr_db"] > 25
    assert report["metric"].keys() == {"float", "simulation", "device"}
    assert (tmp_path / "export/ffnet_nano/ffnet_nano.onnx").is_file()
