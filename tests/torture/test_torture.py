"""A little of each row of `make torture`: nothing is lost."""

from __future__ import annotations

import subprocess
import sys

from tests.torture.__main__ import ROOT


def test_the_short_table_loses_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--short"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
