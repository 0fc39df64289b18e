"""One network through plain AIMET, with what its documentation shows: prepare, fold, simulate, calibrate, export."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo import emulator, floats
from benchmarks.zoo.catalogue import catalogue
from benchmarks.zoo.ours import BATCH, SAMPLES, loss, tensors
from benchmarks.zoo.record import Record
from lightning_quant.deploy import parity


class AsTuple(nn.Module):
    """A network whose answer is of a kind that AIMET does not take: its tensors in a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_leaves(self.network(x)))


def _leaves(output: Any) -> list[Any]:
    """What an output holds, in order; while it is traced these are no tensors."""
    if isinstance(output, Mapping | list | tuple):
        inner = output.values() if isinstance(output, Mapping) else output
        return [leaf for value in inner for leaf in _leaves(value)]
    return [] if output is None else [output]


def measure(record: Record, folder: Path) -> None:
    """All stages for the network and precision of a record."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.setrecursionlimit(20_000)  # copying a long traced graph goes node by node
    entry = catalogue()[record.values["network"]]
    example, samples = entry.batch(1), entry.batch(SAMPLES)
    with record.stage("build"):
        network = entry.build()
        record.values["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    if not record.passed("build"):
        return
    with torch.no_grad():
        taken = _plain(network(*example))
    network = network if taken else AsTuple(network)
    network = prepared_and_folded(network, example, record)
    with record.stage("simulate"):
        from aimet_torch import QuantizationSimModel

        weights, _, activations = record.values["precision"][1:].partition("a")
        sim = QuantizationSimModel(
            network, dummy_input=example, default_param_bw=int(weights), default_output_bw=int(activations),
            config_file="htp_v75",
        )  # fmt: skip
    if not record.passed("simulate"):
        return
    with record.stage("calibrate"), torch.no_grad():
        batches = [tuple(t[i : i + BATCH] for t in samples) for i in range(0, SAMPLES, BATCH)]
        sim.compute_encodings(lambda model: [model(*batch) for batch in batches])
    if not record.passed("calibrate"):
        return
    if record.values["precision"] == "w8a8":
        with record.stage("qat"):
            sim.model.train()
            loss(sim.model(*batches[0])).backward()
            torch.optim.SGD(sim.model.parameters(), lr=1e-4).step()
    sim.model.eval()
    qdq = folder / "model.onnx"
    with record.stage("export"):
        _export(sim, example, samples, qdq, record)
    if emulator.available() and record.passed("export"):
        with record.stage("emulator"):
            _emulate(sim, samples, qdq, folder / "emulator", record)


def prepared_and_folded(network: nn.Module, example: tuple[Tensor, ...], record: Record) -> nn.Module:
    """The network for the simulation; as it was where preparing or folding fails, which AIMET allows."""
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors(network(*example))]
    prepared, original = network, copy.deepcopy(network)
    with record.stage("prepare"):
        from aimet_torch.model_preparer import prepare_model

        prepared = prepare_model(network).eval()
        with torch.no_grad():
            pairs = zip(before, tensors(prepared(*example)), strict=True)
            record.values["prepared_difference"] = max(
                float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs if a.is_floating_point()
            )
    if not record.passed("prepare"):
        prepared = original
    unfolded = copy.deepcopy(prepared)
    with record.stage("fold"):
        from aimet_torch.batch_norm_fold import fold_all_batch_norms

        fold_all_batch_norms(prepared, None, dummy_input=example)
    return prepared if record.passed("fold") else unfolded


def _export(sim: Any, example: tuple[Tensor, ...], samples: tuple[Tensor, ...], qdq: Path, record: Record) -> None:
    import aimet_torch.onnx
    import onnxruntime

    names = [f"input_{index}" for index in range(len(example))]
    aimet_torch.onnx.export(sim.model, example, str(qdq), opset_version=21, dynamo=False, input_names=names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(qdq), options, providers=["CPUExecutionProvider"])
    feeds = _feeds(samples, session)
    expected = _expected(sim, samples)
    agreement = parity.compare(zip(expected, [session.run(None, feed) for feed in feeds], strict=True))
    left = floats.left_in_float(qdq)
    record.values |= {"parity": agreement.to_dict(), "left_in_float": len(left), "left_in_float_names": left[:8]}


def _emulate(sim: Any, samples: tuple[Tensor, ...], qdq: Path, folder: Path, record: Record) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(qdq), providers=["CPUExecutionProvider"])
    order = [value.name for value in session.get_outputs()]
    placement, outputs = emulator.emulate(qdq, _feeds(samples, session), folder, record.left_s)
    record.values |= emulator.placed(placement.npu, list(placement.fallen_back), placement.float_islands)
    got = [[output[name] for name in order] for output in outputs]
    record.values["emulated"] = parity.compare(zip(_expected(sim, samples), got, strict=True)).to_dict()


def _plain(output: Any) -> bool:
    return isinstance(output, Tensor) or (isinstance(output, tuple) and all(isinstance(one, Tensor) for one in output))


def _feeds(samples: tuple[Tensor, ...], session: Any, count: int = 2) -> list[dict[str, np.ndarray]]:
    wanted = {value.name for value in session.get_inputs()}
    named = {f"input_{index}": tensor for index, tensor in enumerate(samples)}
    return [{n: t[i : i + 1].numpy() for n, t in named.items() if n in wanted} for i in range(count)]


def _expected(sim: Any, samples: tuple[Tensor, ...], count: int = 2) -> list[list[np.ndarray]]:
    with torch.no_grad():
        return [[t.numpy() for t in tensors(sim.model(*(t[i : i + 1] for t in samples)))] for i in range(count)]
