"""The most memory that a piece of work took."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Measure the peak over a ``with`` block: allocated on the GPU if one is in use, else of the process (Linux).

    Attributes:
        peak_bytes: the peak, or ``None`` where the system does not report it.
    """

    peak_bytes: int | None = None
    _known = False

    def start(self) -> PeakMemory:
        """Forget the peak until now."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                (_PROCESS / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)
            except OSError:
                self._known = False
            else:
                self._known = True
        return self

    def stop(self) -> int | None:
        """Return the peak since :meth:`start`."""
        if torch.cuda.is_initialized():
            self.peak_bytes = torch.cuda.max_memory_allocated()
        elif self._known and (found := re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())):
            self.peak_bytes = int(found[1]) * 1024
        return self.peak_bytes

    def __enter__(self) -> PeakMemory:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
