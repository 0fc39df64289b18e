"""Recurrent layers and cells, unrolled over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quant.simulation.callsites.attributes import DEFAULT_STATE

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def recurrent(kind: str) -> Callable[..., Any]:
    """Compute ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``, unrolled over the steps.

    A state of zeros that the layer made itself is left out of the first step: nothing is multiplied with it.
    """

    def unrolled(
        input: Tensor,
        hx: Any,
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        x = input.transpose(0, 1) if batch_first else input
        states = tuple(hx) if kind == "lstm" else (hx,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (num_layers * directions)
        last: list[list[Tensor]] = [[] for _ in states]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                own = list(weights[index * each : (index + 1) * each])
                state = [None if is_default_state(one) else one[index] for one in states]
                output, state = _layer(kind, x, state, own, has_biases, bool(direction))
                outputs.append(output)
                for kept, value in zip(last, state, strict=True):
                    kept.append(value)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if dropout and train and layer + 1 < num_layers:
                x = F.dropout(x, dropout)
        ends = tuple(torch.stack(kept) for kept in last)
        return (x.transpose(0, 1) if batch_first else x, *ends)

    return unrolled


def supports_recurrent(*args: Any, **kwargs: Any) -> bool:
    """Return whether a call is not of packed sequences, whose steps have batches of their own sizes."""
    return len(args) >= 3 and isinstance(args[2], (list, tuple)) and isinstance(args[3], bool)


def is_default_state(state: Tensor) -> bool:
    """Return whether a recurrent layer's first state is one that PyTorch's module made of zeros."""
    return DEFAULT_STATE in state.__dict__


def _layer(
    kind: str, x: Tensor, state: list[Any], own: list[Tensor], has_biases: bool, backwards: bool
) -> tuple[Tensor, list[Any]]:
    """Compute one layer in one direction over (T, N, F)."""
    inward, around = own[:2]
    bias_in, bias_around = own[2:4] if has_biases else (None, None)
    projection = own[-1] if len(own) % 2 else None
    steps = F.linear(x, inward, bias_in).unbind(0)
    outputs = []
    for step in reversed(steps) if backwards else steps:
        state = _cell(kind, step, state, around, bias_around, projection)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _cell(
    kind: str, x: Tensor, state: Sequence[Any], around: Tensor, bias: Tensor | None, projection: Tensor | None = None
) -> list[Any]:
    """Compute one step; ``x`` went through the layer's input weights already."""
    hidden = state[0]
    back = F.linear(hidden, around, bias) if hidden is not None else bias
    if kind == "gru":
        xr, xz, xn = x.chunk(3, -1)
        if back is None:
            n = torch.tanh(xn)
            return [n - torch.sigmoid(xz) * n]
        hr, hz, hn = back.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return [n + z * (hidden - n)] if hidden is not None else [n - z * n]
    total = x if back is None else x + back
    if kind == "lstm":
        i, f, g, o = total.chunk(4, -1)
        memory = torch.sigmoid(i) * torch.tanh(g)
        if state[1] is not None:
            memory = torch.sigmoid(f) * state[1] + memory
        hidden = torch.sigmoid(o) * torch.tanh(memory)
        return [hidden if projection is None else F.linear(hidden, projection), memory]
    return [torch.relu(total) if kind == "rnn_relu" else torch.tanh(total)]


def cell(kind: str) -> Callable[..., Any]:
    """Compute ``torch.lstm_cell``, ``torch.gru_cell`` and the plain ones: one step of one layer."""

    def step(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = hx if kind == "lstm" else (hx,)
        state = _cell(
            kind, F.linear(input, w_ih, b_ih), [None if is_default_state(one) else one for one in states], w_hh, b_hh
        )
        return tuple(state) if kind == "lstm" else state[0]

    return step
