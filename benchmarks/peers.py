"""A step of training and of validation with other quantization libraries, as ratios to the same network in float.

Run by `make bench-peers` in an environment of its own for each library, since their requirements exclude each other's
and AIMET's; therefore ratios to float within one run, and the same protocol as `qat_step`: batch norms folded,
cross-entropy, AdamW, one thread, runs in turns, medians. What each quantizes differs and is named in the table.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import resnet18
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

RESULTS = Path(__file__).parent / "results" / "speed"
SHAPE = (8, 3, 192, 256)


class Scores(nn.Module):
    """The scores alone, where a network answers with a dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        return output if isinstance(output, Tensor) else output["out"]


def networks() -> dict[str, nn.Module]:
    from lightning_quant.domains.segmentation.ffnet import ffnet_nano

    lraspp = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=19)
    return {"ffnet_nano": ffnet_nano(), "lraspp": Scores(lraspp), "resnet18": resnet18(num_classes=19)}


def by_modelopt(network: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """NVIDIA Model Optimizer: INT8, frozen scales."""
    import modelopt.torch.quantization as mtq

    with torch.no_grad():
        made = mtq.quantize(network, mtq.INT8_DEFAULT_CFG, lambda model: model(images))
    return made, "inputs of layers with weights and the weights, frozen ranges"


def by_nncf(network: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """NNCF: INT8 with learned ranges."""
    import nncf

    data = nncf.Dataset([images])
    # in a module of its own: NNCF takes a bare graph module for its experimental backend, which does not train
    return nncf.quantize(Scores(network), data, subset_size=1), "inputs of all layers and the weights, learned ranges"


def by_torchao(network: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """torchao: INT8 through an exported graph, ranges that follow a moving average."""
    from torchao.quantization.pt2e import FakeQuantizeBase
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    made = prepare_qat_pt2e(torch.export.export(network, (images,), strict=True).module(), quantizer).to(images.device)
    if not any(isinstance(module, FakeQuantizeBase) for module in made.modules()):
        raise RuntimeError("torchao found nothing to quantize in the exported graph")
    made(images)
    return made, "inputs of layers with weights and the weights, ranges that follow a moving average"


LIBRARIES: dict[str, tuple[str, Callable[[nn.Module, Tensor], tuple[nn.Module, str]]]] = {
    "modelopt": ("nvidia-modelopt", by_modelopt),
    "nncf": ("nncf", by_nncf),
    "torchao": ("torchao", by_torchao),
}


def trainer(network: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), 1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss(network, images, targets).backward()
        optimizer.step()

    return step


def loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    output = network(images)
    if output.dim() == 4:
        return nn.functional.cross_entropy(output, targets[:, : output.shape[2], : output.shape[3]])
    return nn.functional.cross_entropy(output, targets[:, 0, 0])


def saved_bytes(network: nn.Module, images: Tensor, targets: Tensor) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(network, images, targets)
    total = sum(kept.values())
    value.backward()
    return total


def medians(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    for _ in range(rounds):
        for name, function in variants.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table() -> str:
    """Return the results that are there as Markdown, a row for each network and library."""
    rows = ["| network | library | quantized | step | validation | saved |", "|" + " --- |" * 6]
    for path in sorted(RESULTS.glob("peer_*.json")):
        peer = json.loads(path.read_text())
        for one in peer["results"]:
            ratios = [f"{one[key]:.2f}" for key in ("train", "eval", "saved")] if "error" not in one else ["–"] * 3
            cells = [one["network"], f"{path.stem.removeprefix('peer_')} {peer['version']}"]
            rows.append("| " + " | ".join([*cells, one.get("what", one.get("error")), *ratios]) + " |")
    return "\n".join(rows)


def main() -> None:
    """Measure one library on every network; those that cannot quantize one are named with the reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    package, make = LIBRARIES[arguments.library]
    version = importlib.metadata.version(package)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SHAPE, generator=generator)
    targets = torch.randint(0, 5, (SHAPE[0], *SHAPE[2:]), generator=generator)
    results: list[dict[str, Any]] = []
    for name, network in networks().items():
        try:
            folded = fuse(network.eval())
            quantized, what = make(copy.deepcopy(folded).eval(), images)
            both = {"float": folded, arguments.library: quantized.eval()}
            training = medians({k: trainer(n, images, targets) for k, n in both.items()}, arguments.rounds)
            with torch.no_grad():
                evaluating = medians({k: functools.partial(n, images) for k, n in both.items()}, arguments.rounds)
            saved = {k: saved_bytes(n, images, targets) for k, n in both.items()}
        except Exception as error:  # of a library that is not ours: its name and reason go into the table
            results.append({"network": name, "error": f"{type(error).__name__}: {error}"})
            print(name, arguments.library, results[-1]["error"])
            continue
        ratios = {
            key: values[arguments.library] / values["float"]
            for key, values in (("train", training), ("eval", evaluating), ("saved", saved))
        }
        results.append({"network": name, "what": what, "train_s": training, "eval_s": evaluating, **ratios})
        print(name, arguments.library, version, {key: round(value, 2) for key, value in ratios.items()})
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"peer_{arguments.library}.json"
    path.write_text(json.dumps({"version": version, "torch": torch.__version__, "results": results}, indent=1) + "\n")
    (RESULTS / "peers.md").write_text(table() + "\n")


if __name__ == "__main__":
    main()
