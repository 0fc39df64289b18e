"""What of a Trainer and a module cannot work with quantization, refused before anything is done."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_quant.callbacks.lightning_internals import callbacks_of, is_compiled, synchronizes_batch_norms
from lightning_quant.callbacks.lightning_packages import either
from lightning_quant.errors import ConfigurationError

_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
_STRATEGIES = either(FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
_AVERAGING = either(StochasticWeightAveraging, WeightAveraging)


def averaging_callbacks(trainer: pl.Trainer) -> list[Callback]:
    """Return the callbacks that average weights."""
    return [one for one in callbacks_of(trainer) if isinstance(one, _AVERAGING)]


def check_trainer(trainer: pl.Trainer, user: str) -> None:
    """Refuse a strategy that splits parameters, and a precision that has none in float32.

    Args:
        trainer: the Trainer.
        user: name of the callback, for the message.

    Raises:
        ConfigurationError: for one of the two.
    """
    if isinstance(trainer.strategy, _STRATEGIES):
        raise ConfigurationError(
            f"{type(trainer.strategy).__name__} with {user}: expected a strategy that keeps parameters whole. "
            "Use strategy='ddp' or a single device."
        )
    if trainer.precision not in _PRECISIONS:
        raise ConfigurationError(
            f"Trainer(precision={trainer.precision!r}) with {user}: expected one of {', '.join(_PRECISIONS)}. "
            "The simulation keeps weights and ranges in float32; 'bf16-mixed' gives the speed of bfloat16."
        )


def check_synchronized(trainer: pl.Trainer, network: nn.Module, name: str, user: str) -> None:
    """Refuse synchronized batch norms where some are left: Lightning replaces them, without their quantizers.

    Args:
        trainer: the Trainer.
        network: the quantized network.
        name: its dotted attribute, for the message.
        user: name of the callback, for the message.

    Raises:
        ConfigurationError: which names a batch norm.
    """
    if trainer.state.fn != "fit" or not synchronizes_batch_norms(trainer):
        return
    left = [path for path, module in network.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise ConfigurationError(
            f"Trainer(sync_batchnorm=True) with {user}: Lightning would replace {len(left)} batch "
            f"norms of {name!r}, e.g. {left[0]!r}, by others without quantizers. Expected "
            "sync_batchnorm=False. Batch norms that were folded have nothing to synchronize any more; those that "
            "could not be, synchronize by themselves if your module makes them nn.SyncBatchNorm in its __init__."
        )


def check_float_network(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module, callback: Callback, name: str
) -> None:
    """Refuse what would run with, or keep, the float network once it is quantized.

    Args:
        trainer: the Trainer.
        pl_module: the user's module.
        network: the float network in it.
        callback: the quantization callback.
        name: dotted attribute of the network, for the message.

    Raises:
        ConfigurationError: for a callback that averages weights and is listed before this one, and for a compiled
            module or network.
    """
    user = type(callback).__name__
    callbacks = callbacks_of(trainer)
    before = callbacks[: callbacks.index(callback)]
    early = next((one for one in averaging_callbacks(trainer) if one in before), None)
    if early is not None:
        raise ConfigurationError(
            f"{type(early).__name__} is listed before {user}: it would average the float network, whose "
            f"weights have other shapes. List {user} first in callbacks=[...]."
        )
    if is_compiled(pl_module):
        raise ConfigurationError(
            f"torch.compile() of {type(pl_module).__name__} with {user}: expected it uncompiled, since "
            "quantization changes the network. Pass the module itself to the Trainer; "
            "QuantizationAwareTraining(compile=True) compiles the quantized network."
        )
    for path, module in network.named_modules():
        if "_orig_mod" in module._modules:  # what torch.compile() wraps around it
            raise ConfigurationError(
                f"torch.compile() of {name}.{path} with {user}: expected it uncompiled, since quantization changes "
                "the network. Leave the call away; QuantizationAwareTraining(compile=True) compiles the quantized "
                "network."
            )
        if module._compiled_call_impl is not None:
            raise ConfigurationError(
                f"{f'{name}.{path}'.rstrip('.')}.compile() with {user}: expected it uncompiled, since "
                "quantization changes the network. Remove the call; "
                "QuantizationAwareTraining(compile=True) compiles the quantized network."
            )


def check_dense(network: nn.Module, name: str) -> None:
    """Refuse to train embeddings with sparse gradients: a range learns from all of its table.

    Raises:
        ConfigurationError: naming the embedding.
    """
    for path, module in network.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ConfigurationError(
                f"{name}.{path} has sparse=True: expected an embedding with dense gradients, from which the range of "
                "its table learns. Leave sparse=True away, or keep the embedding out of the network (network=...)."
            )


def check_has_float(has_float: bool, user: str) -> None:
    """Refuse to compare with, or learn from, a float network that is not there.

    Raises:
        ConfigurationError: unless it is.
    """
    if not has_float:
        raise ConfigurationError(
            f"max_drop, rungs or distillation of {user} with a module that is quantized already: expected the float "
            "network, to compare with and to learn from. Start from the float module; to resume, make the module "
            "again and give ckpt_path."
        )
