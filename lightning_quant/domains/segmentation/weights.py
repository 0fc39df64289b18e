"""Weights from a file into a network: strict, and without running code from the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.utilities.parsing import read_checkpoint, short_repr

# What may stand before the published names: "model." in a checkpoint of SegmentationTask, "network." in that
# of a module which calls it so.
_PREFIXES = ("model.", "network.")


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into ``network``, strictly, without running code from the file.

    Accepts a plain state dict (the published files), ``{"state_dict": ...}``, and a Lightning checkpoint
    whose module keeps the network as ``model`` or ``network``: then only the entries below that prefix count.

    Args:
        network: receives the weights in place.
        path: a file that ``torch.save`` wrote.

    Raises:
        CheckpointError: when the file is missing or is not a checkpoint of tensors, or its names or shapes are not
            those of ``network``.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No weights at '{path}': expected a file written by torch.save.")
    try:
        content = read_checkpoint(path)
    # A damaged pickle fails with whatever its bytes happen to mean: IndexError, UnpicklingError, EOFError …
    except Exception as error:
        raise CheckpointError(
            f"'{path}' cannot be read as weights: expected a file written by torch.save that holds tensors"
            f" and plain values only. {error}"
        ) from error
    state = _network_state(content, path)
    try:
        network.load_state_dict(state, strict=True)
    except Exception as error:  # PyTorch's own for names and shapes, others for what is not a name
        raise CheckpointError(
            f"The weights in '{path}' do not fit {type(network).__name__}."
            f"{_explain_misfit(state, network.state_dict())}"
        ) from error


def _network_state(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the network's own names."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    entries = dict(content) if isinstance(content, Mapping) else {}
    for prefix in _PREFIXES:
        inner = {str(key).removeprefix(prefix): entries[key] for key in entries if str(key).startswith(prefix)}
        entries = inner or entries
    others = [key for key, value in entries.items() if not isinstance(value, Tensor)]
    if not entries or others:
        found = f" ({short_repr(others[0])} is {short_repr(entries[others[0]])})" if others else ""
        raise CheckpointError(
            f"'{path}' holds no state dict{found}: expected tensors by name, or those under the key 'state_dict'."
        )
    return entries


def _explain_misfit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or differently shaped, three names of each, and what to do."""
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    findings = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "shape": shapes,
    }
    text = "".join(
        f" {len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}."
        for what, names in findings.items()
        if names
    )
    if any("_quantizers." in key for key in given):
        return text + " It is a quantized checkpoint: load it with lightning_quant.load_quantized."
    return text + " Build the variant and num_classes that the weights were saved from."
