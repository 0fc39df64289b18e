"""The cost of a training and a validation step, compared with the float network and AIMET's own classes.

The float network has its batch norms folded. Stock is the same simulation with every quantizer and layer given back
AIMET's class. A step is forward, cross-entropy, backward and AdamW on one thread. Saved for backward: what autograd
keeps between the two passes, parameters left out, each memory counted once.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import float_and_simulated, interleaved, photographs, publish, scores, table
from lightning_quant.simulation.calibrate import calibrate
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.memory import PeakMemory

NETWORKS = ("ffnet_nano", "ffnet_40s", "lraspp", "resnet18")
CASES = (("w8a8", True), ("w4a16", True), ("w8a8", False))


def trainer(network: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], None]:
    """One step of training as a function."""
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), 1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss(network, images, targets).backward()
        optimizer.step()

    return step


def loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy at the network's own resolution."""
    output = scores(network(images))
    if output.dim() == 4:
        return nn.functional.cross_entropy(output, targets[:, : output.shape[2], : output.shape[3]])
    return nn.functional.cross_entropy(output, targets[:, 0, 0])


def validator(network: nn.Module, images: Tensor) -> Callable[[], None]:
    """One batch of validation as a function; weights are held as in a validation loop."""

    def step() -> None:
        with torch.no_grad():
            network(images)

    return step


def saved_bytes(network: nn.Module, images: Tensor, targets: Tensor) -> int:
    """What autograd keeps for the backward pass of one step."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(network, images, targets)
    total = sum(kept.values())  # while the graph holds them, no memory is used twice
    value.backward()
    return total


def peak_bytes(step: Callable[[], None]) -> int:
    """The most memory of the process during a step."""
    with PeakMemory() as memory:
        step()
    return memory.peak_bytes or 0


def measure(name: str, precision: str, learned: bool, images: Tensor, rounds: int = 7) -> dict[str, Any]:
    """Float, stock and ours in turns."""
    from lightning_quant.simulation.fast.short_path import slow_down

    float_network, ours = float_and_simulated(name, precision, images)
    calibrate(ours, [NetworkInputs((images,))])
    ours.learn_ranges(learned)
    stock: QuantizedNetwork = copy.deepcopy(ours)
    slow_down(stock.network)
    targets = torch.randint(0, 5, (len(images), *images.shape[-2:]), generator=torch.Generator().manual_seed(0))
    variants = {"float": float_network, "stock": stock.network, "ours": ours.network}
    steps = {key: trainer(network, images, targets) for key, network in variants.items()}
    training = interleaved(steps, rounds)
    with ours.cached_weights():
        validation = interleaved({key: validator(network, images) for key, network in variants.items()}, rounds)
    saved = {key: saved_bytes(network, images, targets) for key, network in variants.items()}
    peak = {key: peak_bytes(step) for key, step in steps.items()}
    return {
        "network": name, "precision": precision, "learned": learned, "shape": list(images.shape),
        "train_s": training, "eval_s": validation, "saved_bytes": saved, "peak_bytes": peak,
    }  # fmt: skip


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Ratios to float."""
    made = []
    for one in results:
        cells = [f"{one['network']} {'×'.join(map(str, one['shape'][:1] + one['shape'][2:]))}"]
        cells += [one["precision"].upper(), "learned" if one["learned"] else "frozen"]
        for what in ("train_s", "eval_s", "saved_bytes"):
            values = one[what]
            cells += [f"{values[who] / values['float']:.2f}" for who in ("stock", "ours")]
        cells += [f"{1e3 * one['train_s'][who]:.0f}" for who in ("float", "ours")]
        cells += [f"{one['peak_bytes'][who] / 2**20:.0f}" for who in ("float", "stock", "ours")]
        made.append(cells)
    return made


HEADS = (
    "network", "", "ranges", "step: stock", "**ours**", "validation: stock", "**ours**", "saved: stock", "**ours**",
    "ms float", "ms ours", "peak MiB float", "stock", "ours",
)  # fmt: skip


def main() -> None:
    """Measure every network and case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", default="../shared/data/camvid", help="photographs in the layout of Cityscapes")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name in arguments.networks:
        # the deep one by fours: the ratio is what counts, and all of it should take minutes
        images = photographs(arguments.camvid, arguments.batch // 4 if name == "ffnet_40s" else arguments.batch)
        for precision, learned in CASES:
            results.append(measure(name, precision, learned, images, arguments.rounds))
    publish("qat_step", table(HEADS, rows(results)), results)


if __name__ == "__main__":
    main()
