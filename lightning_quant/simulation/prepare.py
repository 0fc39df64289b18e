"""The float network as AIMET can quantize it: batch norms folded, call sites found, checked to be the same."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.errors import PreflightError
from lightning_quant.simulation import aimet
from lightning_quant.simulation.batch_norms import output_factors
from lightning_quant.simulation.callsites.aimet_views import operations_named, shapes_from_traces
from lightning_quant.simulation.callsites.attributes import FOLDED
from lightning_quant.simulation.callsites.instrument import instrument
from lightning_quant.simulation.exportable import read_out
from lightning_quant.simulation.inplace import copied, separate_shared_activations, state_kept, undone_on_error
from lightning_quant.simulation.inputs import NetworkInputs, tensors_in
from lightning_quant.simulation.network import FlatNetwork
from lightning_quant.simulation.normalize import use_torch_classes
from lightning_quant.simulation.preflight import Finding, FindingKind

# Largest change, relative to the largest output, that rewriting in float32 may cause: folding a batch norm
# or decomposing attention reorders sums, which moves results by some 1e-6; a wrong fold moves them by 1e-1.
TOLERANCE = 1e-3
# A deep network without training may move them as far when its input changes in the last digit; one layer after the
# other is rounded in another way then, not the input alone.
_TIMES_ROUNDING = 10
_MOST = 3e-2


@dataclass
class PreparedNetwork:
    """A float network whose layers have the names and weights of its simulation.

    Args:
        network: computes what the user's network computes in eval mode.
        inputs: the example call it was prepared with.
        output: what the user's network answered to it.
        batch_norms: those that were folded, as they were, by the name of the layer that holds them now.
        findings: what could not be rewritten, and how it will be quantized.
    """

    network: nn.Module
    inputs: NetworkInputs
    output: Any
    batch_norms: dict[str, _BatchNorm]
    findings: list[Finding]


def prepare(network: nn.Module, inputs: NetworkInputs, others: Sequence[NetworkInputs] = ()) -> PreparedNetwork:
    """Prepare a copy of ``network``, see :func:`prepare_in_place`."""
    return prepare_in_place(copied(network), inputs, others)


def prepare_in_place(
    network: nn.Module, inputs: NetworkInputs, others: Sequence[NetworkInputs] = ()
) -> PreparedNetwork:
    """Fold the batch norms of ``network`` and give its functional operations modules; the rest stays as it is.

    The network ends in eval mode. If anything fails it is as it was.

    Args:
        network: the float network, on any device.
        inputs: an example call of it; one sample is enough.
        others: calls of other structure, whose operations are wanted too.

    Raises:
        PreflightError: if the network cannot be run, answers without a tensor, or computes something else once its
            operations are modules.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    inputs = inputs.to(device).map(Tensor.detach)
    calls = [inputs, *(other.to(device).map(Tensor.detach) for other in others)]
    # isolated from the caller: hooks, grad mode and the random state stay as they are
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        aimet.quiet(),
        undone_on_error(network),
    ):
        network.eval()
        separate_shared_activations(network)
        twin = copied(network)
        outputs = []
        for call in calls:
            try:
                outputs.append(_drawing_the_same(call, twin))
            except Exception as error:
                raise PreflightError(
                    f"The float network {type(network).__name__} cannot be run on one sample: "
                    f"{type(error).__name__}: {error}. Expected a network that runs in eval mode; mend it, or give "
                    "it other data."
                ) from error
        if not tensors_in(outputs[0]):
            raise PreflightError(
                f"The network {type(network).__name__} returned {type(outputs[0]).__name__} without any tensor "
                "in it: expected a tensor or a structure of tensors."
            )
        batch_norms, findings = _fold_batch_norms(network, twin, calls)
        findings += read_out(instrument(network, calls))
        batch_norms = _by_call_sites(network, batch_norms)
        for call, expected in zip(calls, outputs, strict=True):
            with state_kept(network):
                difference = relative_difference(expected, _drawing_the_same(call, network))
            if difference > _tolerance(network, [call], difference):
                raise PreflightError(
                    f"{type(network).__name__} computes something else once its operations are quantized "
                    f"(relative difference {difference:.1e} with nothing rounded). Expected a forward pass that "
                    "computes the same each time it is run; look for what it keeps from one pass to the next, and "
                    "for operations in place on that."
                )
    return PreparedNetwork(network, inputs, outputs[0], batch_norms, findings)


def _drawing_the_same(call: NetworkInputs, network: nn.Module) -> Any:
    """Run a network that may draw random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return call.call(network)


def _fold_batch_norms(
    network: nn.Module, twin: nn.Module, calls: Sequence[NetworkInputs]
) -> tuple[dict[str, _BatchNorm], list[Finding]]:
    """Fold batch norms into the layers before them, in place; leave all if the numbers change.

    AIMET finds and folds them in a copy, ``twin``, whose layers are given PyTorch's own classes.
    """
    inputs = calls[0]
    renamed = use_torch_classes(twin, inputs)
    if not any(isinstance(module, _BatchNorm) for module in twin.modules()):
        return {}, []
    instrument(twin, calls)
    owners = owners_of_weights(twin)
    norms = {module: name for name, module in twin.named_modules() if isinstance(module, _BatchNorm)}
    layers = {module: name for name, module in twin.named_modules()}
    before = {name: copy.deepcopy(module) for module, name in layers.items() if hasattr(module, "weight")}
    for module in norms:
        if not module.affine:  # AIMET folds those with parameters only
            module.weight = nn.Parameter(torch.ones(module.num_features, device=inputs.tensors[0].device))
            module.bias = nn.Parameter(torch.zeros(module.num_features, device=inputs.tensors[0].device))
            module.affine = True
    expected = [_drawing_the_same(call, twin) for call in calls]
    kept = _Norms(twin)
    try:
        with operations_named(), shapes_from_traces():
            pairs = aimet.fold_all_batch_norms(
                FlatNetwork(twin, inputs).eval(), None, dummy_input=tuple(inputs.tensors)
            )
        kept.restore({one for layer, _ in pairs for one in (layer, owners.get(layer, layer))})
        for layer, _ in pairs:
            if layer in owners and owners[layer].bias is None:  # of the module that owns the weight
                owners[layer].bias = layer._parameters["bias"]
        actual = [_drawing_the_same(call, twin) for call in calls]
        difference = max(map(relative_difference, expected, actual))
    except Exception as error:  # AIMET raises whatever its graph builder met
        problem = f"batch norms could not be folded ({type(error).__name__}: {str(error)[:120]})"
        remedy = "fold them yourself, or expect them as extra operations on the device"
        return {}, [Finding("", problem, remedy, kind=FindingKind.UNFOLDED)]
    if difference > _tolerance(twin, calls, difference):
        problem = f"folding batch norms changed the output by {difference:.1e} (relative); left unfolded"
        remedy = "check for batch norms whose convolution is used elsewhere too"
        return {}, [Finding("", problem, remedy, kind=FindingKind.UNFOLDED)]
    found = {}
    for layer, norm in pairs:
        layer = owners.get(layer, layer)
        name = layers[layer]
        own = renamed.get(name, name)
        _take_over(network.get_submodule(own), layer)
        _remove_norm(network, renamed.get(norms[norm], norms[norm]))
        if _follows(norm, before[name], layer):
            found[own] = norm
    return found, []


def _tolerance(network: nn.Module, calls: Sequence[NetworkInputs], found: float) -> float:
    """Return how far rewriting may move outputs: further where they move far as the input changes in its last digit.

    Args:
        network: the rewritten network.
        calls: of it.
        found: how far rewriting did move them; nothing is computed where that is little.
    """
    if found <= TOLERANCE:
        return TOLERANCE
    generator = torch.Generator().manual_seed(0)

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + torch.finfo(tensor.dtype).eps * signs)

    moved = [call.map(changed) for call in calls]
    with state_kept(network), torch.no_grad():
        outputs, others = ([_drawing_the_same(one, network) for one in given] for given in (calls, moved))
    far = max(map(relative_difference, outputs, others))
    return min(max(TOLERANCE, _TIMES_ROUNDING * far), _MOST)


class _Norms:
    """Parameters and buffers of batch norms as they are: AIMET writes the statistics of those it leaves into weights.

    Where a function is called, these weights are those of a module, which goes on to pass its own statistics with them.
    """

    def __init__(self, network: nn.Module) -> None:
        weights = {
            one for one, sites in _by_weight(network).items() for site in sites.values() if isinstance(site, _BatchNorm)
        }
        self._known: list[tuple[nn.Module, Any, dict[str, Any], dict[str, Tensor]]] = [
            (module, held, dict(held), {name: value.clone() for name, value in held.items() if value is not None})
            for module in network.modules()
            if isinstance(module, _BatchNorm) or not weights.isdisjoint(module._parameters.values())
            for held in (module._parameters, module._buffers)
        ]

    def restore(self, folded_into: Container[nn.Module]) -> None:
        """Give all back what they held, but for a module that holds weights of both kinds."""
        for module, held, objects, values in self._known:
            if module not in folded_into:
                held.clear()
                held.update(objects)
                for name, value in values.items():
                    objects[name].copy_(value)


def owners_of_weights(network: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the modules whose own weights one call site is passed unchanged, by the layer there.

    AIMET changes weights layer by layer, which nothing would come of where they are computed again in each pass, and
    too much where other calls use them too; a batch norm that is called as a function belongs to a module that does
    more. Such layers are made some that AIMET does not know; where it asks for the base class, it finds them still.

    Args:
        network: with call sites, not simulated yet; the classes of layers are changed.
    """
    owning: dict[Tensor | None, nn.Module] = {
        module._parameters["weight"]: module for module in network.modules() if "weight" in module._parameters
    }
    sites = _by_weight(network)
    found = {}
    for weight, layers in sites.items():
        for layer in layers.values():
            if weight in owning and len(layers) == 1 and not isinstance(layer, _BatchNorm):
                found[layer] = owning[weight]
            else:
                layer.__class__ = type("Computed", (type(layer),), {})
    return found


def _by_weight(network: nn.Module) -> dict[Tensor, dict[str, nn.Module]]:
    """Return the layers at call sites by the weight that they were passed, and by their names."""
    found: dict[Tensor, dict[str, nn.Module]] = {}
    for name, layer in network.named_modules():
        if "_takes_weights" in vars(layer):
            found.setdefault(vars(layer)["_weight_of"], {})[name] = layer
    return found


def _by_call_sites(network: nn.Module, batch_norms: dict[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """Return batch norms by the layers that compute with the weights that they were folded into.

    That is the layer at a call site where the module that owns the weights calls a function itself.
    """
    sites = _by_weight(network)
    found = {}
    for owner, norm in batch_norms.items():
        weight: Any = network.get_submodule(owner).weight
        found[next(iter(sites.get(weight, [owner])))] = norm
    return found


def _take_over(layer: Any, folded: Any) -> None:
    """Give a layer the weights that a batch norm was folded into."""
    layer.weight.data = folded.weight.data
    if layer.bias is None:
        layer.bias = nn.Parameter(folded.bias.data, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.data = folded.bias.data


def _remove_norm(network: nn.Module, name: str) -> None:
    """Put an Identity in the place of a batch norm; one that does more than normalize continues to do that."""
    norm = network.get_submodule(name)
    if isinstance(norm, _BatchNorm) and type(norm) not in _PLAIN:
        norm.__dict__[FOLDED] = True
        for part in (*norm._parameters, *norm._buffers):  # nothing would compute with them any more
            setattr(norm, part, None)
        norm.track_running_stats = False
        return
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _follows(norm: _BatchNorm, layer: Any, folded: Any) -> bool:
    """Return whether the batch norm took the output of its layer: AIMET also folds those that come before one."""
    scale = output_factors(norm)
    weight = layer.weight.detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) or weight.shape[0] != scale.numel():
        return False  # channels lie on another axis, in groups
    expected = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return torch.allclose(folded.weight.detach(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def relative_difference(expected: Any, actual: Any) -> float:
    """Return the largest absolute difference between two outputs, relative to the largest expected value."""
    pairs = list(zip(tensors_in(expected), tensors_in(actual), strict=True))
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        a, b = a[finite], b[finite]
        if a.numel():
            scale = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
            worst = max(worst, float((a - b).abs().max() / scale))
    return worst
