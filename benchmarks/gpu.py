"""The cost of a training step, a validation batch and calibration on a CUDA GPU, with three float networks to compare.

The float networks: as the user trains it, batch norms live; with its batch norms folded; folded and compiled. Stock is
the same simulation with every quantizer and layer given back AIMET's class, which has Triton kernels for a GPU. All
variants of a row take turns in one process and medians are compared. A turn is several steps between two events of the
GPU, which nothing waits for in between. A step is forward, cross-entropy, backward and fused AdamW, under autocast and
with a gradient scaler as the Trainer does it.

Saved: what the forward pass leaves allocated for the backward pass. Peak: the most memory of a step beyond what lies
there between two of them, weights and state of the optimizers. Launches: kernels that the host starts in a step.

Each network has a process of its own. They build, calibrate and compile side by side and measure one at a time.
Rows are measured in the order of their value and written at once; one that fails is written with its error.
Images are random numbers, so nothing but this repository is needed. ``--device cpu --tiny`` rehearses it anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import fcntl
import functools
import gc
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

from benchmarks.measure import RESULTS, built, facts, float_and_simulated, table
from benchmarks.peers import LIBRARIES
from benchmarks.qat_step import loss, peak_bytes, saved_bytes
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.compiled import Compiled
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.files import atomic_write

# Image size, and a batch that fills a card of 80 GB.
NETWORKS = {"ffnet_40s": ((512, 1024), 128), "resnet50": ((224, 224), 256), "lraspp": ((512, 512), 64)}
TINY = {"ffnet_40s": ((64, 128), 4), "resnet50": ((64, 64), 4), "lraspp": ((64, 64), 4)}
SMALL_BATCH = {False: 8, True: 2}
CALIBRATION_BATCHES = 4
LONGEST = 15  # kernels of a step that are listed

FLOAT, FOLDED, COMPILED = "float", "float folded", "float folded compiled"
LEARNED, FROZEN, STOCK = "ours learned", "ours frozen", "stock"
LEARNED_COMPILED, FROZEN_COMPILED = "ours learned compiled", "ours frozen compiled"
COMPILED_GRAPHS, LEARNED_GRAPHS = "float folded CUDA graphs", "ours learned CUDA graphs"
DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PEERS = ("modelopt", "torchao")


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Args:
        kind: ``"step"``, ``"peers"`` (steps of other libraries) or ``"calibration"``.
        network: a name of ``NETWORKS``.
        size: height and width of the images.
        batch: how many at once.
        precision: as the Trainer names it.
        channels_last: memory format of weights and images.
        estimator: of the ranges.
    """

    kind: str
    network: str
    size: tuple[int, int]
    batch: int
    precision: str = "32-true"
    channels_last: bool = False
    estimator: str = "min_max"

    def images(self, device: torch.device) -> Tensor:
        """Random numbers, the same each time."""
        images = torch.randn(self.batch, 3, *self.size, generator=torch.Generator().manual_seed(0)).to(device)
        return images.contiguous(memory_format=self.memory_format)

    @property
    def is_small(self) -> bool:
        """Whether the host takes longer to start kernels than the GPU to run them."""
        return self.batch in SMALL_BATCH.values()

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def cases(networks: list[str], tiny: bool) -> list[Case]:
    """All rows, the most important first."""
    sizes = TINY if tiny else NETWORKS
    full = [Case("step", name, *sizes[name]) for name in networks]
    small = [replace(case, batch=SMALL_BATCH[tiny]) for case in full]
    steps = [
        [replace(case, precision=precision, channels_last=channels_last) for case in batch]
        for batch, precision, channels_last in (
            (full, "bf16-mixed", True), (full, "32-true", True),
            (small, "bf16-mixed", True), (full, "16-mixed", True), (full, "bf16-mixed", False),
            (small, "32-true", True), (small, "16-mixed", True), (full, "32-true", False),
            (full, "16-mixed", False), (small, "bf16-mixed", False), (small, "32-true", False),
            (small, "16-mixed", False),
        )
    ]  # fmt: skip
    peers = [[replace(case, kind="peers") for case in group] for group in steps[:2]]  # torchao knows float32 alone
    calibrations = [
        [replace(case, kind="calibration", estimator=estimator) for case in full]
        for estimator in ("min_max", "tf_enhanced")
    ]
    order = [*steps[:2], calibrations[0], peers[0], *steps[2:4], peers[1], steps[4], calibrations[1], *steps[5:]]
    return [case for group in order for case in group]


# ---- what is measured ------------------------------------------------------------------------------------------------
@functools.cache
def simulated(name: str, size: tuple[int, int], estimator: str) -> tuple[nn.Module, QuantizedNetwork]:
    """The folded float network and its simulation, W8A8 and not calibrated, on the CPU; made once for all its rows."""
    small = (max(64, side // 4) for side in size)  # the simulation is the same and there much sooner
    images = torch.randn(1, 3, *small, generator=torch.Generator().manual_seed(1))
    most = images.expand(CALIBRATION_BATCHES * 256, -1, -1, -1)  # what is not calibrated with is only counted
    return float_and_simulated(name, "w8a8", most, range_estimator=estimator)


@dataclass
class Variant:
    """A network in a row.

    Args:
        network: what is called.
        learner: the module whose parameters are trained.
        held: what a loop of validation holds meanwhile, such as weights that are quantized once.
        what: what it quantizes, where that needs saying.
    """

    network: nn.Module
    learner: nn.Module
    held: Callable[[], AbstractContextManager[None]] = nullcontext
    what: str = ""


class InPlace(nn.Module):
    """A compiled simulation, which the callback puts in the network's place for the whole fit."""

    def __init__(self, compiled: Compiled) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, images: Tensor) -> Any:
        with self.compiled.active():
            output = self.compiled.network(images)
        if self.compiled.why_not is not None:
            raise self.compiled.why_not
        return output


def variants(case: Case, images: Tensor, compiled: bool) -> dict[str, Callable[[], Variant]]:
    """How each network of a row is made; one that cannot be does not stop the others."""
    folded, quantized = simulated(case.network, case.size, case.estimator)

    def placed(network: nn.Module) -> nn.Module:
        return network.to(images.device).to(memory_format=case.memory_format)

    def plain(network: nn.Module) -> Variant:
        network = placed(copy.deepcopy(network))
        return Variant(network, network)

    @functools.cache
    def calibrated() -> QuantizedNetwork:
        made = copy.deepcopy(quantized)
        placed(made.network)
        calibrate(made, [NetworkInputs((images,))])
        return made

    def ours(learned: bool, compiled: bool = False, **options: str) -> Variant:
        made = copy.deepcopy(calibrated())
        made.learn_ranges(learned)
        if compiled:
            return Variant(InPlace(Compiled(made.network, options)), made.network)
        return Variant(made.network, made.network, made.cached_weights)

    def stock() -> Variant:
        from lightning_quant.simulation.fast.short_path import slow_down

        made = ours(True)
        slow_down(made.learner)
        return Variant(made.network, made.learner)

    def with_torch_compile(**options: Any) -> Variant:
        made = plain(folded)
        network: Any = torch.compile(made.learner, **options)
        return Variant(network, made.learner)

    def of_peer(name: str) -> Variant:
        made = plain(folded).learner.eval()
        with torch.autocast(images.device.type, enabled=False):
            network, what = LIBRARIES[name][1](made, images)
        return Variant(network, network, what=what)

    made: dict[str, Callable[[], Variant]] = {
        FLOAT: lambda: plain(built(case.network)),
        FOLDED: lambda: plain(folded),
        LEARNED: lambda: ours(True),
        FROZEN: lambda: ours(False),
    }
    if case.kind == "peers":
        return made | {name: functools.partial(of_peer, name) for name in PEERS if _installed(LIBRARIES[name][0])}
    made[STOCK] = stock
    if compiled:
        made[COMPILED] = with_torch_compile
        made[LEARNED_COMPILED] = lambda: ours(True, compiled=True)
        made[FROZEN_COMPILED] = lambda: ours(False, compiled=True)
    if case.is_small:
        made[COMPILED_GRAPHS] = lambda: with_torch_compile(mode="reduce-overhead")
        made[LEARNED_GRAPHS] = lambda: ours(True, compiled=True, mode="reduce-overhead")
    return made


@dataclass(frozen=True)
class Kernels:
    """What a step runs on the GPU.

    Args:
        launches: how many the host starts.
        longest: milliseconds and count of those that take longest in all, by name.
    """

    launches: int
    longest: dict[str, tuple[float, int]]


@dataclass
class Loop:
    """Steps of training and validation of one variant, as the Trainer runs them."""

    variant: Variant
    images: Tensor
    targets: Tensor
    precision: str

    def __post_init__(self) -> None:
        kind = self.images.device.type
        parameters = (p for p in self.variant.learner.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True if kind == "cuda" else None)
        self.scaler = torch.amp.GradScaler(kind, enabled=self.precision == "16-mixed")

    def autocast(self) -> AbstractContextManager[Any]:
        """What the Trainer's precision plugin puts around a forward pass."""
        dtype = DTYPES[self.precision]
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.images.device.type, dtype=dtype, cache_enabled=False)

    def train(self) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        with self.autocast():
            value = loss(self.variant.network, self.images, self.targets)
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def validate(self) -> None:
        """One batch of validation."""
        with torch.no_grad(), self.autocast():
            self.variant.network(self.images)

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Eval mode, and what a validation loop holds."""
        _mode(self.variant.learner, False)
        try:
            with self.variant.held():
                yield
        finally:
            _mode(self.variant.learner, True)

    def saved(self) -> int:
        """What a forward pass leaves for the backward pass; on a CPU what autograd says that it keeps."""
        self.optimizer.zero_grad()
        with self.autocast():
            if not self.images.is_cuda:
                return saved_bytes(self.variant.network, self.images, self.targets)
            before = torch.cuda.memory_allocated()
            value = loss(self.variant.network, self.images, self.targets)
            return torch.cuda.memory_allocated() - before - value.nbytes

    def peak(self) -> int:
        """The most memory of a step beyond what was there before; of the whole process on a CPU."""
        self.optimizer.zero_grad()
        before = torch.cuda.memory_allocated() if self.images.is_cuda else 0
        return peak_bytes(self.train) - before

    def kernels(self) -> Kernels | None:
        """What a step of training runs on the GPU; unknown on a CPU."""
        if not self.images.is_cuda:
            return None
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            self.train()
            torch.cuda.synchronize()
        events = profiler.key_averages()
        ran = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and "#" not in e.key]
        ran = sorted(ran, key=lambda e: -e.self_device_time_total)[:LONGEST]
        return Kernels(
            sum(e.count for e in events if "LaunchKernel" in e.key or "GraphLaunch" in e.key),
            {e.key[:120]: (round(e.self_device_time_total / 1e3, 3), e.count) for e in ran},
        )


def _mode(network: nn.Module, training: bool) -> None:
    if isinstance(network, torch.fx.GraphModule):  # of torchao
        from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train

        (move_exported_model_to_train if training else move_exported_model_to_eval)(network)
    else:
        network.train(training)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- time ------------------------------------------------------------------------------------------------------------
def clocked(step: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one of several steps in a row."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - started) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()  # so that the GPU has something to do when the clock starts
    begin.record()
    for _ in range(times):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


class Turns:
    """Lets variants take turns, and drops those that fail.

    Args:
        device: where they run.
        turn: seconds that one of them has at a time.
        rounds: how many turns each gets.
        seconds: after which no further round is begun; two there are in any case.
    """

    def __init__(self, device: torch.device, turn: float, rounds: int, seconds: float) -> None:
        self.device, self.turn, self.rounds, self.seconds = device, turn, rounds, seconds
        self.errors: dict[str, str] = {}

    def attempt(self, name: str, function: Callable[[], Any]) -> Any:
        """Run a function of a variant; ``None`` if it fails or has failed before."""
        if name in self.errors:
            return None
        try:
            return function()
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            print(f"    {name}: {self.errors[name]}", flush=True)
        _tidy()  # outside of the handler: the traceback holds what the failed step had in memory
        return None

    def _warm(self, step: Callable[[], None]) -> float:
        step()  # it finds the fastest convolutions or compiles
        return clocked(step, 2, self.device)

    def medians(self, steps: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        """Median seconds of a step of each variant."""
        times = {}
        for name, step in steps.items():
            once = self.attempt(name, functools.partial(self._warm, step))
            if once is not None:
                times[name] = max(2, round(self.turn / once))
        seconds: dict[str, list[float]] = {name: [] for name in times}
        started = time.monotonic()
        for turn in range(self.rounds):
            if turn >= 2 and time.monotonic() - started > self.seconds:
                break
            for name, count in times.items():
                one = self.attempt(name, functools.partial(clocked, steps[name], count, self.device))
                if one is not None:
                    seconds[name].append(one)
        return {name: statistics.median(values) for name, values in seconds.items() if values}


class Card:
    """The GPU, which several processes use while they prepare and one alone while it measures.

    Args:
        lock: a file that all of them know, or ``None`` where there is one.
        seconds: how long one may prepare while others wait to measure.
    """

    def __init__(self, lock: Path | None, seconds: float = math.inf) -> None:
        self._file = None if lock is None else lock.open("w")
        self._seconds = seconds
        self._until = math.inf

    def shared(self) -> None:
        """Use it beside others; waits for the one that measures."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            self._until = time.monotonic() + self._seconds

    def is_wanted(self) -> bool:
        """Return whether others have waited long enough."""
        return time.monotonic() > self._until

    def alone(self) -> None:
        """Have it alone; waits until all others have stopped preparing."""
        _wait(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- rows ------------------------------------------------------------------------------------------------------------
def measure_steps(
    case: Case,
    row: dict[str, Any],
    turns: Turns,
    compiled: bool,
    wanted: list[str] | None,
    card: Card,
    save: Callable[[], None],
) -> None:
    """Fill a row with what steps of training and validation cost; what is known so far is saved."""
    images = case.images(turns.device)
    targets = torch.randint(0, 5, (case.batch, *case.size), generator=torch.Generator().manual_seed(0))
    targets = targets.to(turns.device)
    row["errors"] = turns.errors
    loops: dict[str, Loop] = {}
    makers = {
        name: lambda make=make: Loop(make(), images, targets, case.precision)
        for name, make in variants(case, images, compiled).items()
        if wanted is None or name in wanted
    }
    for name, make in makers.items():
        if card.is_wanted():
            turns.errors[name] = "left out: the others were prepared by then"
            continue
        # what fails beside others, which fill the memory too, may run alone: that decides
        with contextlib.suppress(Exception):
            loops[name] = make()
            _mode(loops[name].variant.learner, True)
            loops[name].train()
            with loops[name].validating():
                loops[name].validate()
        _tidy()
    card.alone()
    for name, make in makers.items():
        if name not in loops and (loop := turns.attempt(name, make)) is not None:
            loops[name] = loop
            _mode(loop.variant.learner, True)
    loops = {name: loops[name] for name in makers if name in loops}
    row["what"] = {name: loop.variant.what for name, loop in loops.items() if loop.variant.what}
    row["train_s"] = turns.medians({name: loop.train for name, loop in loops.items()})
    save()
    for what in ("saved", "peak"):
        row[what] = {name: turns.attempt(name, getattr(loop, what)) for name, loop in loops.items()}
    ran = {name: turns.attempt(name, loop.kernels) for name, loop in loops.items()}
    row["launches"] = {name: one.launches for name, one in ran.items() if one}
    row["kernels"] = {name: one.longest for name, one in ran.items() if one}
    save()
    with contextlib.ExitStack() as stack:
        for loop in loops.values():
            stack.enter_context(loop.validating())
        row["eval_s"] = turns.medians({name: loop.validate for name, loop in loops.items()})


def measure_calibration(case: Case, row: dict[str, Any], turns: Turns, card: Card) -> None:
    """Fill a row with the cost of calibration and of forward passes of the folded float network, all in float32."""
    folded, quantized = simulated(case.network, case.size, case.estimator)
    images = case.images(turns.device)
    calls = [NetworkInputs((images,))] * CALIBRATION_BATCHES
    folded, ours = copy.deepcopy(folded).to(turns.device), copy.deepcopy(quantized)
    ours.network.to(turns.device)

    def forward() -> None:
        with torch.no_grad():
            for _ in range(CALIBRATION_BATCHES):
                folded(images)

    def timed(function: Callable[[], Any]) -> float:
        function()
        _wait(turns.device)
        started = time.perf_counter()
        function()
        _wait(turns.device)
        return time.perf_counter() - started

    row["errors"] = turns.errors
    card.alone()
    row["calibration_s"] = {
        name: turns.attempt(name, functools.partial(timed, function))
        for name, function in ((FOLDED, forward), (LEARNED, functools.partial(calibrate, ours, calls)))
    }


def measured(case: Case, arguments: argparse.Namespace, compiled: bool, card: Card, save: Callable[..., None]) -> None:
    """One row, whatever happens in it."""
    row: dict[str, Any] = asdict(case)
    save(row)
    card.shared()
    started = time.monotonic()
    turns = Turns(torch.device(arguments.device), arguments.turn, arguments.rounds, arguments.turns_seconds)
    try:
        if case.kind == "calibration":
            measure_calibration(case, row, turns, card)
        else:
            measure_steps(case, row, turns, compiled, arguments.variants, card, save)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
        print(f"    {row['error']}", flush=True)
    row["took_s"] = round(time.monotonic() - started, 1)
    save()
    torch.compiler.reset()
    _tidy()


# ---- results ---------------------------------------------------------------------------------------------------------
HEADS = (
    "network", "variant", "step ms", "/ float", "/ folded", "/ compiled", "validation ms", "/ folded", "/ compiled",
    "saved MiB", "/ folded", "peak MiB", "launches",
)  # fmt: skip


def rendered(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    made: list[list[str]] = []
    calibrations: list[list[str]] = []
    for row in results["rows"]:
        size = f"{row['network']} {row['batch']}×{'×'.join(map(str, row['size']))}"
        if row["kind"] == "calibration":
            seconds = row.get("calibration_s", {})
            calibrations.append([
                size, row["estimator"], *(_number(seconds.get(name), 1e3) for name in (FOLDED, LEARNED)),
                _ratio(seconds, LEARNED, FOLDED) or str(row.get("error") or row.get("errors", {}).get(LEARNED, "")),
            ])  # fmt: skip
            continue
        head = f"{size} {row['precision']} {'channels_last' if row['channels_last'] else 'NCHW'}"
        head += f", a run of commit {row['commit']}" if "commit" in row else ""
        train, validation = row.get("train_s", {}), row.get("eval_s", {})
        saved, errors = row.get("saved", {}), row.get("errors", {})
        for name in dict.fromkeys((*train, *errors)):
            made.append([
                head, f"**{name}**" if name.startswith("ours") else name,
                _number(train.get(name), 1e3) or errors.get(name, "").partition("\n")[0][:80],
                *(_ratio(train, name, base) for base in (FLOAT, FOLDED, COMPILED)),
                _number(validation.get(name), 1e3), *(_ratio(validation, name, base) for base in (FOLDED, COMPILED)),
                _number(saved.get(name), 2**-20), _ratio(saved, name, FOLDED),
                _number(row.get("peak", {}).get(name), 2**-20), str(row.get("launches", {}).get(name) or ""),
            ])  # fmt: skip
            head = ""
        if "error" in row:
            made.append([head or size, "", row["error"][:80], *[""] * (len(HEADS) - 3)])
    card = f"{results['card']}, torch {results['torch']}, aimet-torch {results['aimet']}, commit {results['commit']}"
    parts = [f"{card}, {results['date']}.", table(HEADS, made)]
    if calibrations:
        heads = ["network", "ranges", "float forward passes ms", "calibration ms", "**in float forward passes**"]
        parts.append(table(heads, calibrations))
    return "\n\n".join(parts)


def _number(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    return f"{factor * value:.0f}" if factor * value >= 100 else f"{factor * value:.3g}"


def _ratio(values: Mapping[str, float | None], name: str, base: str) -> str:
    above, below = values.get(name), values.get(base)
    return f"{above / below:.2f}" if above and below else ""


def gpu_facts(device: torch.device, commit: str) -> dict[str, Any]:
    """What was measured on, and with what."""
    known = facts()
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{known['processor']} (a rehearsal)"
    versions = {
        name: importlib.metadata.version(package) if _installed(package) else None
        for name, package in (
            ("triton", "triton"), ("aimet", "aimet-torch"), ("modelopt", "nvidia-modelopt"), ("torchao", "torchao"),
        )
    }  # fmt: skip
    return {
        **known, **versions, "card": card, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "commit": commit or known["commit"], "date": datetime.date.today().isoformat(),
    }  # fmt: skip


@contextlib.contextmanager
def building_for_peers(device: str) -> Iterator[None]:
    """Let ModelOpt build its CUDA kernels in a process of its own while the first rows run: it takes a minute."""
    if not device.startswith("cuda") or not _installed("nvidia-modelopt"):
        yield
        return
    code = "from modelopt.torch.quantization.extensions import get_cuda_ext; get_cuda_ext()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    """Measure row after row until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small images and few steps: a rehearsal")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", type=int, default=None, help="only the first so many")
    parser.add_argument("--kinds", nargs="+", default=["step", "peers", "calibration"])
    parser.add_argument("--compiled", type=int, default=1, help="rows of a network, from the first, with torch.compile")
    parser.add_argument("--variants", nargs="+", default=None, metavar="NAME", help="only these, by their full names")
    parser.add_argument("--seconds", type=float, default=330, help="no row is begun after these")
    parser.add_argument("--turns-seconds", type=float, default=12, help="of a row, after which turns are left out")
    parser.add_argument("--turn", type=float, default=None, help="seconds that a variant has at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--prepare-seconds", type=float, default=math.inf, help="side by side; what is not begun then is left out"
    )
    parser.add_argument("--lock", type=Path, help="measure in turns with the processes that were given the same file")
    parser.add_argument("--commit", default="", help="where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--render", type=Path, help="print the table of such a file, measure nothing")
    arguments = parser.parse_args()
    if arguments.render:
        print(rendered(json.loads(arguments.render.read_text())))
        return
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("Skipped: this machine has no CUDA GPU.")
        return
    if len(arguments.networks) > 1 and arguments.lock is None:
        with building_for_peers(arguments.device) if "peers" in arguments.kinds else nullcontext():
            measure_side_by_side(arguments)
    else:
        measure_rows(arguments)
    Console(width=200).print(Markdown(rendered(json.loads(arguments.results.read_text()))))


def measure_rows(arguments: argparse.Namespace) -> None:
    """Measure row after row in this process until the time is up."""
    until = time.monotonic() + arguments.seconds
    arguments.turn = arguments.turn or (0.02 if arguments.tiny else 0.3)
    if arguments.tiny:
        arguments.rounds = min(arguments.rounds, 2)
    torch.backends.cudnn.benchmark = True
    results: dict[str, Any] = {**gpu_facts(torch.device(arguments.device), arguments.commit), "rows": []}
    card = Card(arguments.lock, arguments.prepare_seconds)

    def save(row: dict[str, Any] | None = None) -> None:
        if row is not None:
            results["rows"].append(row)
        write(arguments.results, results)

    compiled = 0
    wanted = [case for case in cases(arguments.networks, arguments.tiny) if case.kind in arguments.kinds]
    for case in wanted[: arguments.rows]:
        if time.monotonic() > until:
            print("The time is up.", flush=True)
            break
        print(f"{arguments.seconds - until + time.monotonic():6.1f} s  {case}", flush=True)
        compiled += case.kind == "step"
        measured(case, arguments, compiled <= arguments.compiled, card, save)


def measure_side_by_side(arguments: argparse.Namespace) -> None:
    """Measure each network in a process of its own; what they have written is put together as it comes."""
    order = [_of(asdict(case)) for case in cases(arguments.networks, arguments.tiny)]
    threads = max(1, (os.cpu_count() or 1) // (2 * len(arguments.networks)))
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: Path(folder, f"{name}.json") for name in arguments.networks}
        given = sys.argv[1:]
        processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "benchmarks.gpu", *given, "--networks", name, "--results", str(part),
                    "--lock", str(Path(folder, "lock")),
                ],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            for name, part in parts.items()
        ]  # fmt: skip
        try:
            running = True
            while running:
                running = any(process.poll() is None for process in processes)
                time.sleep(1)
                made = [json.loads(part.read_text()) for part in parts.values() if part.exists()]
                if made:
                    rows = sorted((row for one in made for row in one["rows"]), key=lambda row: order.index(_of(row)))
                    write(arguments.results, {**made[0], "rows": rows})
        finally:
            for process in processes:
                process.kill()


def _of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row was asked for, its images' size left out, which a network's rows have in common."""
    return tuple(row[field.name] for field in fields(Case) if field.name != "size")


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results, whole at any time, and their table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, json.dumps(results, indent=1)), (path.with_suffix(".md"), rendered(results))):
        with atomic_write(target) as partial:
            partial.write_text(text + "\n")


if __name__ == "__main__":
    main()
