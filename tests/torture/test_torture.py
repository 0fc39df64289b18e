"""A little of each row of `make torture`: nothing is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.torture.__main__ import ROOT

pytestmark = pytest.mark.slow


def test_the_short_table_loses_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--short"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
