"""The peak of memory over a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_quant.utilities import memory
from lightning_quant.utilities.memory import PeakMemory


def test_the_peak_is_that_of_the_block() -> None:
    with PeakMemory() as small:
        pass
    with PeakMemory() as large:
        block = torch.ones(200_000_000)  # 800 MB: far more than the system takes back from the process meanwhile
        del block
    with PeakMemory() as after:
        pass
    if large.peak_bytes is None or small.peak_bytes is None or after.peak_bytes is None:
        pytest.skip("this system does not tell the peak of a process")
    assert large.peak_bytes - small.peak_bytes > 400e6
    assert large.peak_bytes - after.peak_bytes > 400e6


def test_an_exception_propagates_and_the_peak_is_known() -> None:
    peak = PeakMemory()
    with pytest.raises(ValueError, match="inside"), peak:
        raise ValueError("inside")
    if not torch.cuda.is_available() and Path("/proc/self/clear_refs").exists():
        assert peak.peak_bytes is not None
        assert peak.peak_bytes > 50e6  # a process that has loaded PyTorch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells")
def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "absent")
    with PeakMemory() as peak:
        pass
    assert peak.peak_bytes is None
