"""The examples run as they stand, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_example_learns_and_exports(tmp_path: Path) -> None:
    example = EXAMPLES / "quantize_your_module.py"
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, check=True)
    accuracy = float(done.stdout.strip().splitlines()[-1].rpartition(":")[2])
    assert accuracy > 0.8
    assert (tmp_path / "export/classifier/classifier.aimet/model.encodings").is_file()


def test_the_push_ends_on_the_best_target_that_is_there(tmp_path: Path) -> None:
    example = EXAMPLES / "push_to_ai_hub.py"
    environment = {**os.environ, "QAIHUB_CLIENT_INI": str(tmp_path / "none.ini")}  # not on anybody's account
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout[done.stdout.index("\n{\n") :])
    assert report["tier"] in ("htp_emulator", "onnxruntime")
    assert report["against_float"]["psnr_db"] > 25
    assert report["metric"].keys() == {"float", "simulation", "device"}
    assert (tmp_path / "export/ffnet_nano/ffnet_nano.onnx").is_file()
