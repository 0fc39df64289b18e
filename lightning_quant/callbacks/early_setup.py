"""The user's ``setup`` and ``configure_model``, run before the callback that needs what they make.

Lightning calls the callbacks' ``setup`` first. The quantization callback runs the module's steps there, which may need
what the module makes in its own ``setup``, up to the network itself. So the callback calls both hooks, and further
calls do nothing until the stage begins: each runs once, as without the callback.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_quant.callbacks.lightning_packages import is_overridden

_HOOKS = ("setup", "configure_model")


def set_up_early(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
    """Call ``setup`` and ``configure_model`` of the module now; further calls do nothing until :func:`end_early_setup`.

    Args:
        trainer: the Trainer, in its setup.
        pl_module: the user's module.
        stage: what Lightning will pass to its ``setup``.
    """
    for name in _HOOKS:
        if _was_called(pl_module, name) or not is_overridden(name, pl_module):
            continue
        if name == "setup":
            pl_module.setup(stage=stage)
        else:
            strategy = trainer.strategy
            with (
                strategy.tensor_init_context(),
                strategy.model_sharded_context(),
                trainer.precision_plugin.module_init_context(),
            ):
                pl_module.configure_model()
        vars(pl_module)[name] = partial(_nothing)


def end_early_setup(pl_module: pl.LightningModule) -> None:
    """Restore the module's hooks: the stage begins, or the run has failed."""
    for name in _HOOKS:
        if _was_called(pl_module, name):
            del vars(pl_module)[name]


def _was_called(pl_module: pl.LightningModule, name: str) -> bool:
    own = vars(pl_module).get(name)
    return isinstance(own, partial) and own.func is _nothing


def _nothing(*_: Any, **__: Any) -> None:
    """Replace a hook that was called before."""
