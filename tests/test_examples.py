"""The examples run as they stand, in an empty folder."""

from __future__ import annotations

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
