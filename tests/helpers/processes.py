"""Scripts that run as a user runs them, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment, with this project on the path and one thread for PyTorch."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def run_two_ranks(folder: Path, script: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a script whose Trainer starts a second rank; return what both saved as ``rank0.pt`` and ``rank1.pt``."""
    (folder / "train.py").write_text(script)
    variables = environment(MASTER_ADDR="127.0.0.1")
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT"):
        variables.pop(name, None)
    command = [sys.executable, str(folder / "train.py"), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
