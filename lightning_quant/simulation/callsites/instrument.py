"""Find the call sites of a network by running it, and give each its module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.simulation import aimet
from lightning_quant.simulation.callsites.attributes import (
    CONTAINERS,
    FOLDED,
    IN_TRACES_ONLY,
    LIST_SITES,
    OWNER,
    WEIGHT,
)
from lightning_quant.simulation.callsites.checkpointing import follow_checkpoints
from lightning_quant.simulation.callsites.decompositions.pooling import is_uneven
from lightning_quant.simulation.callsites.functions import AUGMENTED, tensors_among
from lightning_quant.simulation.callsites.joins import SourceSite
from lightning_quant.simulation.callsites.passes import current, observed_by, paused
from lightning_quant.simulation.callsites.read_out import ReadOut
from lightning_quant.simulation.callsites.recording import Found, Recorder
from lightning_quant.simulation.callsites.sites import DecomposedSite, Site, add_site
from lightning_quant.simulation.callsites.traces import run_in_trace
from lightning_quant.simulation.callsites.watching import watch
from lightning_quant.simulation.inplace import state_kept
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.network import FlatNetwork

# Layers that AIMET knows as one operation and the hardware as several, or that compute no output of a device.
_DECOMPOSED = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.GroupNorm,
    nn.SiLU,
    nn.Mish,
    nn.GLU,
    nn.PReLU,
    nn.MaxPool3d,
    nn.AvgPool3d,
    nn.AdaptiveMaxPool3d,
    nn.SELU,
    nn.CELU,
    nn.LogSigmoid,
    nn.LocalResponseNorm,
    nn.LPPool2d,
    nn.Softsign,
    nn.Softshrink,
    nn.Tanhshrink,
    nn.Threshold,
    nn.Softmin,
    nn.CosineSimilarity,
    nn.Fold,
    nn.Unfold,
    nn.ChannelShuffle,
    nn.PairwiseDistance,
    nn.modules.loss._Loss,
)
# AIMET's package of classes that are several operations to the hardware, whole layers of a language model among them.
_TRANSFORMERS = "aimet_torch.nn.transformers"


def is_layer(module: nn.Module) -> bool:
    """Return whether AIMET quantizes a module as a whole, and may: nothing in it was changed from the outside."""
    if isinstance(module, nn.Identity):
        return True
    quantized = aimet.QuantizationMixin.cls_to_qcls.get(type(module))
    if quantized is None or quantized.__module__.startswith(_TRANSFORMERS) or isinstance(module, _DECOMPOSED):
        return False
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return False
    if isinstance(module, nn.Upsample) and (module.mode == "area" or _by_part_of_a_factor(module)):
        return False
    if isinstance(module, nn.modules.padding._ConstantPadNd) and module.value != 0:
        return False
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d)) and module.ceil_mode:
        return False
    if getattr(module, "divisor_override", None) is not None or (isinstance(module, nn.Softplus) and module.beta != 1):
        return False
    own = vars(module)
    if "forward" in own or module._forward_hooks or module._forward_pre_hooks:
        return False
    # a weight that something else makes: pruned, normalized
    return not any(isinstance(own.get(part), Tensor) for part in ("weight", "bias"))


def _by_part_of_a_factor(module: nn.Upsample) -> bool:
    """Return whether it depends on the size of its input whether the NPU takes an upsampling as it is."""
    factor = module.scale_factor
    factors = factor if isinstance(factor, tuple) else () if factor is None else (factor,)
    return "linear" in module.mode and any(not float(one).is_integer() for one in factors)


def instrument(root: nn.Module, calls: Sequence[NetworkInputs]) -> list[ReadOut]:
    """Give every functional operation of ``root`` that an output depends on a module, in place.

    Modules that are called more than once in a pass are no layers any more: each call computes with a site of its own.

    Args:
        root: the network, in eval mode.
        calls: examples; the first is traced too, since some code asks whether it is.

    Returns:
        Where values of activations leave PyTorch.
    """
    follow_checkpoints()
    for module in root.modules():
        if FOLDED in vars(module):  # nothing is left that could normalize
            watch(module)
    with state_kept(root):
        layers = _layers(root, calls)
    for module in root.modules():
        if module not in layers:
            watch(module)
    with state_kept(root):
        others = _layers_with_reused_inputs(root, calls, layers)
    for module in others:
        layers.remove(module)
        watch(module)
    recorder = Recorder(root)
    with torch.no_grad(), state_kept(root), _opaque(layers, recorder):
        for call in calls:
            _recorded(root, call, recorder)
        _traced(root, calls[0], recorder)
    _install(root, recorder.pending.values())
    return list(recorder.read_out)


def _layers_with_reused_inputs(
    root: nn.Module, calls: Sequence[NetworkInputs], layers: set[nn.Module]
) -> set[nn.Module]:
    """Return layers in place whose input others use too, and see changed: a ReLU that a shortcut goes around."""
    changing = [module for module in layers if getattr(module, "inplace", False) is True]
    recorder = Recorder(root)
    try:
        for module in changing:
            vars(module)["inplace"] = False  # so that its input and its output are two tensors
        with torch.no_grad(), _opaque(layers, recorder, changing):
            for call in calls if changing else ():
                _recorded(root, call, recorder)
    finally:
        for module in changing:
            vars(module)["inplace"] = True
    return recorder.aliases.layers


def _recorded(root: nn.Module, call: NetworkInputs, recorder: Recorder) -> None:
    known, pending, aliases = None, recorder.pending, recorder.aliases
    while known != (aliases.refused, aliases.followed, aliases.parts):
        known = set(aliases.refused), set(aliases.followed), set(aliases.parts)
        recorder.pending = dict(pending)
        recorder.forget()
        own = call.map(torch.clone)  # it may change what it is given
        recorder.begin(own.tensors)
        with observed_by(recorder):
            root(*own.args, **own.kwargs)


def _traced(root: nn.Module, call: NetworkInputs, recorder: Recorder) -> None:
    class Recorded(FlatNetwork):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            recorder.begin(tensors)
            return super().forward(*tensors)

    before = dict(recorder.pending)
    try:
        with aimet.quiet(), observed_by(recorder):
            run_in_trace(Recorded(root, call), tuple(call.tensors))
    except Exception:
        recorder.pending = before


def _layers(root: nn.Module, calls: Sequence[NetworkInputs]) -> set[nn.Module]:
    """Return the modules that AIMET quantizes as a whole: known to it, called once in a pass at most, by position."""
    most: Counter[nn.Module] = Counter()
    opened: set[nn.Module] = set()
    for call in calls:
        most |= _calls(root, call, opened)
    single = (nn.Dropout, nn.Identity, nn.Flatten)
    return {
        module
        for module in root.modules()
        # what none of the calls uses, such as a head for training alone, the device does not compute
        if module is not root
        and is_layer(module)
        and module not in opened
        and (most[module] == 1 or isinstance(module, single))
    }


def _calls(root: nn.Module, call: NetworkInputs, opened: set[nn.Module]) -> Counter[nn.Module]:
    """Count how often each module is called in a pass; add to ``opened`` those that are no layers in such a call."""
    counts: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        counts[module] += 1
        if tensors_among(kwargs) or is_uneven(module, args):  # AIMET rounds no tensor that is given by name
            opened.add(module)

    handles = [one.register_forward_pre_hook(count, prepend=True, with_kwargs=True) for one in root.modules()]
    try:
        with torch.no_grad():
            call.call(root)
    finally:
        for handle in handles:
            handle.remove()
    return counts


@contextmanager
def _opaque(layers: Iterable[nn.Module], recorder: Recorder, changing: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Hide the inside of layers from the recorder.

    Args:
        layers: the layers.
        recorder: learns who uses the inputs of those that are in ``changing``.
        changing: layers among them that work in place.
    """
    stack: list[paused] = []
    in_place_layers = set(changing)

    def enter(_: nn.Module, args: Any) -> None:
        recorder.aliases.used(tensors_among(current(args)))
        stack.append(paused())
        stack[-1].__enter__()

    def leave(module: nn.Module, args: Any, _: Any) -> None:
        if module in in_place_layers:
            recorder.aliases.changed_by_layer(module, current(args[0]))  # looks at tensors: not seen while paused
        stack.pop().__exit__()

    with _hooked(layers, enter, leave):
        yield


@contextmanager
def _hooked(modules: Iterable[nn.Module], before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    handles = []
    for module in list(modules):
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _install(root: nn.Module, found: Iterable[Found]) -> None:
    parameters: dict[Tensor, str] = {parameter: name for name, parameter in root.named_parameters()}
    found = list(found)
    joins = any(one.site is SourceSite for one in found)
    for one in found:
        if one.child is None:
            is_decomposed = one.site is DecomposedSite
            site = DecomposedSite(one.name, one.at, joins) if is_decomposed else one.site(one.name, one.at)
            add_site(one.module, one.at, site)
            continue
        assert one.holder is not None
        one.child.eval()
        own = vars(one.child)
        own["_weight_of"] = one.weight  # until the simulation is built
        own[WEIGHT] = "" if one.weight is None else parameters.get(one.weight, "")
        if one.traced:
            own[IN_TRACES_ONLY] = True
        own[OWNER] = id(one.module)
        own["_repeats"] = (id(one.module), one.at[0]) if one.repeats else None
        name = _free_name(one.holder, one.name)
        one.holder.add_module(name, one.child)
        if isinstance(one.holder, CONTAINERS):
            vars(one.holder)[LIST_SITES] = (*vars(one.holder).get(LIST_SITES, ()), name)
        add_site(one.module, one.at, Site(one.name, one.holder, name, one.holder is one.module, one.at))


def _free_name(holder: nn.Module, name: str) -> str:
    name = AUGMENTED.get(name, name).removesuffix("*")
    base = name[1:] if name in ("radd", "rsub", "rmul", "rtruediv", "rdiv", "rmatmul", "rpow") else name
    base = {"truediv": "div"}.get(base, base)
    free, number = base, 0
    while hasattr(holder, free):
        number += 1
        free = f"{base}_{number}"
    return free
