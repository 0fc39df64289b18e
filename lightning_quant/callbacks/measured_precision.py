"""The precision a run measures in: that of training, or full float32 where a grid needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision

from lightning_quant.simulation.network import QuantizedNetwork
from lightning_quant.utilities.full_precision import full_precision

# What Lightning runs the user's steps in, but for training_step.
_CONTEXTS = ("val_step_context", "test_step_context", "predict_step_context")


class Measuring:
    """The context that a run measures in: full precision where one of its networks has more than 8 bits somewhere.

    Evaluated at each use: a restored checkpoint or a rung may have changed the bit widths of layers.

    Args:
        networks: the quantized networks of the run.
        refines: whether a network may get more than 8 bits in the run.
    """

    def __init__(self, networks: Iterable[QuantizedNetwork], refines: bool = False) -> None:
        self._quantizers = [quantizer for network in networks for quantizer in network.quantizers()]
        self._refines = refines

    @property
    def in_full(self) -> bool:
        """Whether the context is full precision now."""
        return self._refines or any(quantizer.bitwidth > 8 for quantizer in self._quantizers)

    def __call__(self) -> AbstractContextManager[None]:
        """Return the context."""
        return full_precision() if self.in_full else nullcontext()


def hook_measuring(plugin: Precision, measuring: Callable[[], AbstractContextManager[object]]) -> Callable[[], None]:
    """Run every step of validation, test and prediction in a context, inside of the one that the plugin has for it.

    Args:
        plugin: of the Trainer that runs.
        measuring: gives the context.

    Returns:
        What removes the hooks.
    """
    off = ExitStack()
    for name in _CONTEXTS:
        own = getattr(plugin, name)
        if name in vars(plugin):  # somebody else's hook
            off.callback(setattr, plugin, name, own)
        else:
            off.callback(vars(plugin).pop, name, None)
        setattr(plugin, name, _within(own, measuring))
    return off.close


def _within(own: Any, measuring: Callable[[], AbstractContextManager[object]]) -> Any:
    @contextmanager
    def context() -> Iterator[None]:
        with own(), measuring():
            yield

    return context


def precision_notice(trainer: pl.Trainer, fine: bool) -> str | None:
    """Describe which precision training and measuring compute in; ``None`` where it is float32 on a CPU.

    Args:
        trainer: the Trainer, in its setup.
        fine: whether it measures with all digits of float32.
    """
    fits = trainer.state.fn == "fit"
    precision = trainer.precision
    if fine and (precision != "32-true" or trainer.strategy.root_device.type != "cpu"):
        training = f"Training computes in {precision}; what" if fits else "What"
        return (
            f"{training} is measured and reported is computed in float32, without autocast and TF32, which have fewer "
            "values than a 16-bit activation."
        )
    if precision != "32-true":
        return f"{'Training and what is measured compute' if fits else 'What is measured is computed'} in {precision}."
    return None
