"""Float32 with all its digits, whatever autocast and the fast modes of single operations are set to.

bfloat16 keeps 8 significant bits, float16 and TF32 keep 11: of the 65,536 values of a 16-bit activation about 1,260 and
7,000 are left. PyTorch lets convolutions on a GPU compute in TF32 unless it is set otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 in float32 for the length of a block: no autocast, no TF32, no bfloat16 inside of operations.

    Everything is as the user set it afterwards. What the block itself puts under autocast, or casts, stays that way.
    """
    with ExitStack() as before:
        before.enter_context(_without_fast_modes())
        accelerator = torch.accelerator.current_accelerator()
        for kind in ("cpu",) if accelerator is None else ("cpu", accelerator.type):
            if torch.is_autocast_enabled(kind):
                before.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _without_fast_modes() -> Iterator[None]:
    """Set the switches that PyTorch has for single operations, in its older and in its newer words.

    Both speak of the same operations, and reading the older ones raises where the two disagree. So the older ones are
    set first, which sets the newer ones along, and those only where something is left. A user who has set what cannot
    be said in the older words has the newer ones set alone.
    """
    operations = _operations()
    known = [operation.fp32_precision for operation in operations]
    with ExitStack() as older:
        try:
            cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        except RuntimeError:  # the user speaks in the newer words
            pass
        else:
            if cudnn:
                older.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
                torch.backends.cudnn.allow_tf32 = False
            if matmul != "highest":
                older.callback(torch.set_float32_matmul_precision, matmul)
                torch.set_float32_matmul_precision("highest")
        try:
            for operation in operations:
                if operation.fp32_precision not in _FULL:
                    operation.fp32_precision = "ieee"
            yield
        finally:
            older.close()
            for operation, precision in zip(operations, known, strict=True):
                if operation.fp32_precision != precision:
                    operation.fp32_precision = precision


_FULL = ("ieee", "none")


def _operations() -> list[Any]:
    backends: Any = torch.backends  # whose modules are made at run time
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]
