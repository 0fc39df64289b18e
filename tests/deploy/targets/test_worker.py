"""The processes that targets start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.processes import environment


@pytest.mark.parametrize("target", ["aihub", "htp"])
def test_a_worker_starts_without_pytorch(target: str) -> None:
    """Which takes seconds to import; a push starts several workers."""
    script = f"import sys, lightning_quant.deploy.targets.{target}.worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
