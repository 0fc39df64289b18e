"""The compiled fake quantization, built once a machine with the C++ compiler that is there."""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

import ninja
import torch

log = logging.getLogger(__name__)

# as PyTorch builds its own kernels, so that a folder shared by several machines has a build for each
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


class Activation(IntEnum):
    """What is computed in the same pass before the fake quantization."""

    NONE = 0
    RELU = 1
    HARDSWISH = 2


@functools.cache
def unavailable() -> str | None:
    """Build and load the kernels, once a process; the reason why there are none, or ``None``.

    The build takes some 15 seconds and is kept where PyTorch keeps extensions (``TORCH_EXTENSIONS_DIR``), by version
    of PyTorch and instruction set. Setting ``LIGHTNING_QUANT_STOCK=1`` turns the kernels off.
    """
    if os.environ.get("LIGHTNING_QUANT_STOCK") == "1":
        return "LIGHTNING_QUANT_STOCK=1 is set"
    if platform.system() != "Linux":
        return f"they are built on Linux only, this is {platform.system()}"
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    name = re.sub(r"\W", "_", f"lightning_quant_{torch.__version__}_{capability}").lower()
    started = time.monotonic()
    try:
        with _silent("torch.utils.cpp_extension"), _on_path(ninja.BIN_DIR):
            from torch.utils import cpp_extension

            cpp_extension.load(
                name,
                [str(Path(__file__).with_name("kernels.cpp"))],
                extra_cflags=flags + _INSTRUCTIONS.get(capability, []),
                extra_ldflags=["-fopenmp"],
                is_python_module=False,
            )
    except Exception as error:  # no compiler, no headers, no room: whatever it is, AIMET's own kernels do the work
        return f"building them failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if (seconds := time.monotonic() - started) > 2:
        log.info("Built the kernels of fake quantization in %.0f s; the next process finds them built.", seconds)
    return None


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """PyTorch warns there that a machine without a GPU has none."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """A virtual environment that was not activated has its programs off the path."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
