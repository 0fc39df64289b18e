"""Importing AIMET leaves the user's program as it was: its logging, its warnings and its standard output."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from lightning_quant.simulation import aimet

_PROGRAM = """
import logging, sys, warnings
import torch
root = logging.getLogger()
root.setLevel(logging.ERROR)
warnings.simplefilter("error", UserWarning)
before = list(root.handlers), root.level, list(warnings.filters)
{first}
from lightning_quant.simulation import aimet
module = aimet.load()
assert module.__name__ == "aimet_torch" and aimet.load() is module
after = list(root.handlers), root.level, list(warnings.filters)
assert {first!r} or after == before, (before, after)
from aimet_torch.common.utils import AimetLogger
logger = AimetLogger.get_area_logger(AimetLogger.LogAreas.Quant)
print("LEVEL", logger.level, len(logger.handlers), logger.propagate)
"""


def _run(first: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(first=first)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_import_changes_neither_logging_nor_warnings_and_prints_nothing() -> None:
    assert _run("") == "LEVEL 30 0 True\n"


@pytest.mark.slow
def test_a_program_that_imported_aimet_itself_keeps_its_logging() -> None:
    first = (
        "import aimet_torch; from aimet_torch.common.utils import AimetLogger; "
        "AimetLogger.set_level_for_all_areas(logging.DEBUG)"
    )
    assert "LEVEL 10 1" in _run(first)


def test_quiet_silences_aimets_warnings_for_its_own_length_only() -> None:
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with aimet.quiet():
            warnings.warn("baked in", torch.jit.TracerWarning, stacklevel=1)
            warnings.warn("mine", UserWarning, stacklevel=1)
        warnings.warn("after", DeprecationWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["mine", "after"]
    assert list(warnings.filters) == filters
