"""What the benchmarks of speed share: alternating runs, medians, tables, and where results go."""

from __future__ import annotations

import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

from benchmarks.networks import NETWORKS, SPEED_ONLY
from lightning_quant.domains.segmentation.datamodule import CityscapesDataModule
from lightning_quant.precision import Precision
from lightning_quant.recipe import QuantRecipe
from lightning_quant.simulation import aimet
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import FlatNetwork, QuantizedNetwork

RESULTS = Path(__file__).parent / "results" / "speed"


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each variant; they take turns, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    for _ in range(rounds):
        for name, function in variants.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def publish(name: str, markdown: str, values: Any) -> None:
    """Print a table and keep it with its numbers."""
    Console(width=160).print(Markdown(markdown))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**facts(), "results": values}, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown + "\n")


def facts() -> dict[str, Any]:
    """What was measured on."""
    return {
        "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
        "processor": _processor(), "commit": _commit(), "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a copy of the files on a machine without git
        return ""
    return done.stdout.strip()


def photographs(camvid: str, count: int, size: tuple[int, int] = (192, 256)) -> Tensor:
    """Normalized photographs (count, 3, height, width); enlarged where they are smaller, again from the first one."""
    data = CityscapesDataModule(camvid, batch_size=count)
    data.setup("fit")
    loaded: list[Tensor] = []
    for images, _ in data.train_dataloader():
        loaded.append(images)
        if sum(map(len, loaded)) >= count:
            break
    images = torch.cat(loaded)
    images = images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
    if images.shape[-2:] != size:
        images = nn.functional.interpolate(images, size, mode="bilinear")
    return images.contiguous()


def built(name: str) -> nn.Module:
    """A float network as its users have it, with the same weights each time."""
    torch.manual_seed(0)
    return SPEED_ONLY[name]() if name in SPEED_ONLY else NETWORKS[name].build()


def float_and_simulated(name: str, precision: str, images: Tensor, **recipe: Any) -> tuple[nn.Module, QuantizedNetwork]:
    """A network with its batch norms folded and nothing else changed, and its simulation, not calibrated."""
    aimet.load()
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    network = built(name).eval()
    folded = copy.deepcopy(network)
    call = NetworkInputs((images[:1],))
    with torch.no_grad(), aimet.quiet():
        fold_all_batch_norms(FlatNetwork(folded, call).eval(), None, dummy_input=tuple(call.tensors))
    made = QuantRecipe(Precision.parse(precision), calibration_samples=len(images), **recipe)
    return folded, quantize(network, call, made).eval()


def scores(output: Any) -> Tensor:
    """The one tensor in a network's answer."""
    return output if isinstance(output, Tensor) else next(iter(output.values()))
