"""Traces that see what is computed inside of autograd functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def functions_inlined() -> Iterator[None]:
    """Let a trace see through autograd functions, whose forward may hold call sites.

    Those of PyTorch and AIMET, and those that say themselves how they are exported, stay as they are.
    """
    patched = [cls for cls in _subclasses(torch.autograd.Function) if "apply" not in vars(cls) and _is_opaque(cls)]
    for cls in patched:
        cls.apply = classmethod(_inlined)
    try:
        yield
    finally:
        for cls in patched:
            del cls.apply


def _subclasses(cls: Any) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def _is_opaque(cls: Any) -> bool:
    return cls.__module__.partition(".")[0] not in ("aimet_torch", "torch") and not hasattr(cls, "symbolic")


def _inlined(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if cls.setup_context is not torch.autograd.Function.setup_context:  # its forward takes no context
        return cls.forward(*args, **kwargs)
    return cls.forward(_NoContext(), *args, **kwargs)


class _NoContext:
    """Takes what a forward saves for a backward that does not come."""

    needs_input_grad = (False,) * 64

    def save_for_backward(self, *_: Any) -> None:
        return None

    mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_forward = save_for_backward
