"""Loading a quantized network back from an ordinary Lightning checkpoint."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.callbacks.lightning_internals import WITHOUT_INSTANTIATOR
from lightning_quant.callbacks.lightning_packages import check_module_class
from lightning_quant.callbacks.networks import find_network, quantized_networks
from lightning_quant.errors import CheckpointError, ConfigurationError
from lightning_quant.recipe import HARDWARE_CONFIGS, QuantRecipe
from lightning_quant.simulation.build import quantize
from lightning_quant.simulation.inputs import NetworkInputs
from lightning_quant.simulation.manifest import MANIFEST_KEY, Manifest
from lightning_quant.simulation.network import check_ranges
from lightning_quant.simulation.range_estimators import RangeEstimator
from lightning_quant.utilities.parsing import read_checkpoint

Module = TypeVar("Module", bound=pl.LightningModule)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return how the network in a checkpoint was quantized: precision, hardware, overrides, versions, inputs.

    Of several networks it is the first one.

    Raises:
        CheckpointError: if the file is missing, damaged or holds no quantized network.
    """
    return next(iter(_manifests(_read(path), path).values())).to_dict()


def load_quantized(
    module_class: type[Module],
    checkpoint_path: str | Path,
    *,
    hardware: str | None = None,
    example_inputs: NetworkInputs | None = None,
    **kwargs: Any,
) -> Module:
    """Rebuild a quantized LightningModule from a checkpoint: structure, weights and ranges.

    Examples:
        >>> module = load_quantized(MyModule, "last.ckpt")  # doctest: +SKIP
        >>> trainer.validate(module, datamodule=data)  # doctest: +SKIP

    Args:
        module_class: the LightningModule's class, of ``lightning.pytorch`` or ``pytorch_lightning``.
        checkpoint_path: an ordinary Lightning checkpoint of a quantized module. It is read with
            ``weights_only=True``: nothing in it is executed.
        hardware: path of the hardware config, if it was a JSON file of your own.
        example_inputs: a call of the network, for networks whose inputs hold objects of your own classes.
        **kwargs: arguments of ``module_class`` that are not among its saved hyperparameters.

    Returns:
        The module in eval mode on the CPU, ready for ``validate``, ``predict``, export or further training.

    Raises:
        CheckpointError: if the file is damaged, not quantized, or does not fit ``module_class``.
        ConfigurationError: if ``module_class`` is not a LightningModule.
    """
    check_module_class(module_class, "load_quantized()")
    checkpoint = _read(checkpoint_path)
    manifests = _manifests(checkpoint, checkpoint_path)
    if example_inputs is not None and len(manifests) > 1:
        raise ConfigurationError(
            f"example_inputs for {checkpoint_path}, which holds {len(manifests)} quantized networks: expected none, "
            "since it is a call of one network."
        )
    parts = {
        name: _recipe_and_inputs(manifest, checkpoint_path, hardware, example_inputs)
        for name, manifest in manifests.items()
    }
    try:
        with warnings.catch_warnings():
            # the quantized part is missing on purpose here: it is built and loaded below
            warnings.filterwarnings("ignore", message="Found keys that are", category=UserWarning)
            module = module_class.load_from_checkpoint(
                checkpoint_path,
                map_location="cpu",
                strict=False,
                weights_only=True,
                **{**WITHOUT_INSTANTIATOR, **kwargs},
            )
        for name, (recipe, inputs, others) in parts.items():
            given = find_network(module, name)
            prefix, state = f"{name}.", checkpoint["state_dict"]
            _normalize(given, {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
            quantize(given, inputs, recipe, others)
        module.load_state_dict(checkpoint["state_dict"])
        for network in quantized_networks(module).values():
            check_ranges(network)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint_path}: {error}") from error
    except Exception as error:  # of the class, of PyTorch or of AIMET, by what in the file does not fit
        raise CheckpointError(
            f"{checkpoint_path} does not fit {module_class.__name__}: {type(error).__name__}: {error}. Expected the "
            "class and arguments the checkpoint was written with."
        ) from error
    return module.eval()


def _normalize(network: nn.Module, state: dict[str, Any]) -> None:
    """Give a float network weights with which quantizing it can be verified; its own are loaded afterwards.

    It has the weights of the one in a checkpoint, and still the batch norms that were folded into them: it would
    normalize a second time. Weights that were trained with their activations cut off at the ends of ranges can grow
    without bound, too, where nothing is cut off.

    Args:
        network: the float network, its weights loaded.
        state: the network's part of the checkpoint.
    """
    for name, parameter in network.named_parameters():
        if name in state and parameter.dim() > 1 and parameter.is_floating_point():
            parameter.data = F.normalize(parameter.data.flatten(1)).reshape(parameter.shape)  # rows of length one
    for name, module in network.named_modules():
        bias = state.get(f"{name}.bias")
        if isinstance(bias, Tensor) and "bias" in module._parameters and module.bias is None:
            module.bias = nn.Parameter(bias.clone())
        if not isinstance(module, _BatchNorm) or module.running_var is None or f"{name}.running_var" in state:
            continue
        assert module.running_mean is not None
        module.running_mean.zero_()
        module.running_var.fill_(1.0 - module.eps)
        with torch.no_grad():
            for parameter, value in ((module.weight, 1.0), (module.bias, 0.0)):
                if parameter is not None:
                    parameter.fill_(value)


def _recipe_and_inputs(
    manifest: Manifest, path: str | Path, hardware: str | None, example_inputs: NetworkInputs | None
) -> tuple[QuantRecipe, NetworkInputs, list[NetworkInputs]]:
    try:
        if hardware is None and manifest.hardware not in HARDWARE_CONFIGS:
            raise ValueError(f"hardware={manifest.hardware!r} is a file")  # never looked for by what a file says
        recipe = QuantRecipe(
            precision=manifest.precision,
            hardware=hardware or manifest.hardware,
            overrides=manifest.overrides,
            range_estimator=RangeEstimator.of_checkpoint(manifest.range_estimator),
        )
        others = [NetworkInputs.from_description(one) for one in manifest.other_inputs]
        return recipe, example_inputs or NetworkInputs.from_description(manifest.inputs or {}), others
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The manifest in {path} cannot be used: {error}. Expected what lightning_quant wrote; give "
            "a hardware config of your own again, with hardware=..."
        ) from error


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise CheckpointError(f"No checkpoint at {str(path)!r}: expected a Lightning checkpoint file.")
    try:
        checkpoint = read_checkpoint(Path(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that are not loaded for safety, or is damaged: {error}. Expected tensors and "
            "plain values; save hyperparameters as such, or allow a class you trust with "
            "torch.serialization.add_safe_globals."
        ) from error
    except Exception as error:  # zip, EOF, struct and runtime errors, by where the damage is
        raise CheckpointError(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path} is not a Lightning checkpoint: expected a dict with a 'state_dict'.")
    return checkpoint


def _manifests(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Manifest]:
    """Return the manifests of the quantized networks in a checkpoint, by dotted name."""
    suffix = "._extra_state"
    found = {}
    for key, value in checkpoint["state_dict"].items():
        if isinstance(key, str) and key.endswith(suffix) and isinstance(value, dict) and MANIFEST_KEY in value:
            try:
                found[key.removesuffix(suffix)] = Manifest.of_checkpoint(value)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
    if found:
        return found
    raise CheckpointError(
        f"{path} holds no quantized network: expected a checkpoint saved after PostTrainingQuantization or "
        "QuantizationAwareTraining. For a float one use load_from_checkpoint of your own class."
    )
