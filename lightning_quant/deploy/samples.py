"""Samples that a target computes, with the outputs of simulation and float network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_quant.deploy.edges.host import app_outputs, fed, taken
from lightning_quant.deploy.edges.plan import AppPlan
from lightning_quant.deploy.manifest import BundleManifest
from lightning_quant.errors import DataError
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.files import atomic_write
from lightning_quant.utilities.modules import on_cpu_in_eval
from lightning_quant.utilities.parsing import check, read_arrays

# One sample: tensors by name, batch axis of length 1 included.
Tensors = dict[str, np.ndarray]


@dataclass
class Samples:
    """Inputs, and the outputs to compare a device's with.

    Args:
        inputs: one entry per sample.
        simulation: the simulation's outputs for each.
        float_network: the float network's outputs for each; ``None`` where the float network is not known.
    """

    inputs: list[Tensors]
    simulation: list[Tensors]
    float_network: list[Tensors] | None = None

    @classmethod
    def of(
        cls,
        network: QuantizedNetwork,
        manifest: BundleManifest,
        calls: Iterable[NetworkInputs],
        plan: AppPlan | None = None,
    ) -> Samples:
        """Run simulation and float network on some calls, each of one sample.

        Args:
            network: the quantized network.
            manifest: of the bundle it was exported to, for the names of inputs and outputs.
            calls: one sample each.
            plan: of a graph with edges: inputs are what an app gives it, and outputs what the app's own work on the
                host makes of those of simulation and float network.

        Raises:
            ConfigurationError: for calls that are not made of pixels, where the plan has an image.
        """
        calls = [call.to(torch.device("cpu")) for call in calls]
        inputs = [_named(manifest.input_names, call.tensors) for call in calls]
        if plan is not None:
            inputs = [{one.name: fed(one, sample[one.name]) for one in plan.inputs} for sample in inputs]
            seen = [[torch.from_numpy(taken(one, sample[one.name])) for one in plan.inputs] for sample in inputs]
            calls = [call.with_tensors(tensors) for call, tensors in zip(calls, seen, strict=True)]
        simulation = _outputs(network.network, manifest.output_names, calls)
        known = network.float_network
        float_network = None if known is None else _outputs(known, manifest.output_names, calls)
        if plan is not None:
            simulation = [app_outputs(plan, one) for one in simulation]
            float_network = (
                None if float_network is None else [app_outputs(plan, one, in_float=True) for one in float_network]
            )
        return cls(inputs, simulation, float_network)

    def write(self, path: Path) -> None:
        """Write everything to one ``.npz`` file, whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        for part in ("inputs", "simulation", "float_network"):
            for index, tensors in enumerate(getattr(self, part) or []):
                arrays |= {f"{part}/{index}/{name}": value for name, value in tensors.items()}
        with atomic_write(path) as partial:
            np.savez(partial, **arrays)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> Samples:
        """Read what :meth:`write` wrote.

        Raises:
            DataError: when it is missing or damaged.
        """
        parts: dict[str, dict[int, Tensors]] = {"inputs": {}, "simulation": {}, "float_network": {}}
        try:
            for key, array in read_arrays(path).items():
                part, _, rest = key.partition("/")
                index, _, name = rest.partition("/")
                known = part in parts and index.isdecimal() and len(index) < 10 and name
                check(bool(known), "the name of a member", key, "inputs/0/NAME, simulation/0/… or float_network/0/…")
                check(array.dtype.kind != "U", f"{key}.dtype", str(array.dtype), "numbers")
                parts[part].setdefault(int(index), {})[name] = array
            for part, found in parts.items():
                count = len(parts["inputs"]) or 1
                if part != "float_network" or found:
                    check(sorted(found) == list(range(count)), part, sorted(found), "every sample from 0 on")
                    forms = {tuple((name, a.dtype, a.shape) for name, a in one.items()) for one in found.values()}
                    check(len(forms) == 1, part, sorted(map(str, forms)), "the same names, types and shapes in all")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no samples: {error}. Export again.") from error
        lists = {part: [found[index] for index in sorted(found)] for part, found in parts.items()}
        return cls(lists["inputs"], lists["simulation"], lists["float_network"] or None)


def _outputs(network: nn.Module, names: Sequence[str], calls: Iterable[NetworkInputs]) -> list[Tensors]:
    with on_cpu_in_eval(network):
        return [_named(names, tensors_in(call.call(network))) for call in calls]


def _named(names: Sequence[str], tensors: Iterable[torch.Tensor]) -> Tensors:
    return {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
