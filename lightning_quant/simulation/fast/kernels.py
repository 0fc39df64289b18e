"""The kernels for CPUs, built once per machine with the C++ compiler that is there."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

import ninja
import torch
from filelock import FileLock

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / name for name in ("fake_quantize.cpp", "biases.cpp", "calibration.cpp")]
_HEADER = _FOLDER / "layout.h"
# By the start of PyTorch's name for what the processor can do; a folder that several machines share has a build for
# each.
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}
_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


class Activation(IntEnum):
    """What is computed in the same pass before the fake quantization."""

    NONE = 0
    RELU = 1
    HARDSWISH = 2
    RELU6 = 3
    SILU = 4  # on GPUs only: its exponential has other last bits than PyTorch's


@functools.cache
def unavailable() -> str | None:
    """Build and load the kernels, once per process, and return why there are none, or ``None``.

    Called where a tensor on the CPU is to be quantized, so that a machine that only uses its GPU builds nothing.
    The build takes some 20 seconds and is kept below ``TORCH_EXTENSIONS_DIR`` or the user's cache folder, by version
    of PyTorch and instruction set. Setting ``LIGHTNING_QUANT_STOCK=1`` turns the kernels off.
    """
    reason = _reason()
    if reason is not None:
        log.info("Fake quantization runs on AIMET's own kernels, which is slower on a CPU: %s.", reason)
    return reason


def _reason() -> str | None:
    if os.environ.get("LIGHTNING_QUANT_STOCK") == "1":
        return "LIGHTNING_QUANT_STOCK=1 is set"
    if platform.system() != "Linux":
        return f"they are built on Linux only, this is {platform.system()}"
    try:
        _load()
    except Exception as error:  # no compiler, no headers, no room: whatever it is, AIMET's own kernels do the work
        return f"building them failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _load() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    sources = b"".join(path.read_bytes() for path in (*_SOURCES, _HEADER))
    version = hashlib.sha256(sources).hexdigest()[:8]  # another version of this package has its own
    name = re.sub(r"\W", "_", f"lightning_quant_{torch.__version__}_{capability}_{version}").lower()
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "lightning_quant" / name
    folder.mkdir(parents=True, exist_ok=True)
    instructions = [flag for key, flags in _INSTRUCTIONS.items() if capability.startswith(key) for flag in flags]
    # PyTorch waits forever for a lock file that a killed process left; whoever holds this lock may remove it
    with FileLock(folder.with_suffix(".lock")), _silent("torch.utils.cpp_extension"), _on_path(ninja.BIN_DIR):
        library, complete = folder / f"{name}.so", folder / "complete"
        if complete.exists() and library.exists():  # ninja would build it again for the same sources in another place
            torch.ops.load_library(str(library))
            return
        (folder / "lock").unlink(missing_ok=True)
        complete.unlink(missing_ok=True)
        log.info("Building the kernels of fake quantization, once on this machine: about 20 s.")
        from torch.utils import cpp_extension

        cpp_extension.load(
            name,
            [str(path) for path in _SOURCES],
            extra_cflags=_FLAGS + instructions,
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
        complete.touch()


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Silence a logger: PyTorch warns there that a machine without a GPU has none."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """Prepend a folder to the path: a virtual environment that was not activated has its programs elsewhere."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
