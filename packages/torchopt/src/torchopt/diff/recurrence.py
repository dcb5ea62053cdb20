# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers and packed sequences in elementary operations, which every transform can run.

In `torch.func.vmap`, torch has no rule for LSTM, GRU, RNN and packing, and runs cells in a loop
over the batch. Packing and packed sequences work in no transform of `torch.func`, nor in forward
mode. The functions here take the arguments of torch's own operations and return the same values and
derivatives. Their first argument is that operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear, pad

from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import (
    below_transforms,
    in_forward_mode,
    in_make_fx,
    in_vmap,
    is_batched,
    is_packed,
    is_transforming,
    outside_transforms,
    packed_read,
)

__all__ = ["ELEMENTARY", "elementary"]

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM: `[batch, size]` each

_SEQUENCE = ("input", "hx", "params")
_PACKED = ("data", "batch_sizes", "hx", "params")
_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def _layer(function: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Return the outputs, the last h of each layer and direction and, for an LSTM, the last c."""
    name = function.__name__
    packed = is_packed(name, args, kwargs)
    given = dict(zip((*(_PACKED if packed else _SEQUENCE), *_OPTIONS), args), **kwargs)
    batch_first, sizes = given.get("batch_first", False), None
    if packed:
        sizes = _shared(given["batch_sizes"], "a packed sequence").tolist()
        x = given["data"]
    else:
        x = given["input"].transpose(0, 1) if batch_first else given["input"]
    lstm, directions = name == "lstm", 1 + given["bidirectional"]
    starts: tuple[Tensor, ...] = tuple(given["hx"]) if lstm else (given["hx"],)
    projects = lstm and starts[0].shape[-1] != starts[1].shape[-1]
    count = 2 + 2 * given["has_biases"] + projects
    step = _STEPS[name]
    ends: list[State] = []
    for layer in range(given["num_layers"]):
        found = []
        for direction in range(directions):
            k = len(ends)
            weights = _weights(given["params"][k * count : (k + 1) * count], given["has_biases"])
            y, end = _run(step, x, tuple(s[k] for s in starts), weights, sizes, direction == 1)
            found.append(y)
            ends.append(end)
        x = torch.cat(found, -1) if directions == 2 else found[0]
        if given["train"] and given["dropout"] > 0 and layer < given["num_layers"] - 1:
            x = drop(x, given["dropout"])
    return x.transpose(0, 1) if batch_first else x, *map(torch.stack, zip(*ends))


def _cell(
    function: Any,
    input: Tensor,  # noqa: A002 - torch's name
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """Return the next h, or (h, c) of an LSTM."""
    name = function.__name__.removesuffix("_cell")
    lstm = name == "lstm"
    weights = w_ih, w_hh, b_ih, b_hh, None
    state = tuple(hx) if lstm else (hx,)
    found = _STEPS[name](linear(input, w_ih, b_ih), state, weights)
    return found if lstm else found[0]


def _weights(given: Sequence[Tensor], biases: bool) -> tuple[Tensor | None, ...]:
    """Return w_ih, w_hh, b_ih, b_hh and the projection; None for those that a layer lacks."""
    rest = given[4:] if biases else given[2:]
    return *given[:2], *(given[2:4] if biases else (None, None)), (rest[0] if rest else None)


def _run(
    step: Callable[..., State],
    x: Tensor,
    start: State,
    weights: Any,
    sizes: list[int] | None,
    backward: bool,
) -> tuple[Tensor, State]:
    """Return the outputs and the last state of one layer in one direction.

    Args:
        step: Maps W x + b, the state and the weights to the next state.
        x: `[time, batch, inputs]`, or the data of a packed sequence, `[sum(sizes), inputs]`.
        start: The initial state.
        weights: Those of `_weights`.
        sizes: How many sequences, the longest first, reach each time; None: all.
        backward: Whether time runs backward.
    """
    from_input = linear(x, weights[0], weights[2])
    steps = from_input.unbind() if sizes is None else from_input.split(sizes)
    if sizes is None:
        sizes = [start[0].shape[0]] * len(steps)
    outputs: list[Tensor] = []
    ended: list[State] = []
    state = tuple(s[:0] for s in start)
    order = range(len(steps))
    for t in reversed(order) if backward else order:
        size, now = sizes[t], len(state[0])
        if size > now:  # further sequences start
            state = tuple(torch.cat([s, i[now:size]]) for s, i in zip(state, start))
        elif size < now:  # the shortest ones have ended
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        state = step(steps[t], state, weights)
        outputs.append(state[0])
    end = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended)))
    outputs = outputs[::-1] if backward else outputs
    return (torch.stack if x.ndim == 3 else torch.cat)(outputs), end


def _lstm(from_input: Tensor, state: State, weights: Any) -> State:
    h, c = state
    i, f, g, o = (from_input + linear(h, weights[1], weights[3])).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if weights[4] is None else linear(h, weights[4]), c


def _gru(from_input: Tensor, state: State, weights: Any) -> State:
    (h,) = state
    r, z, n = from_input.chunk(3, -1)
    of_r, of_z, of_n = linear(h, weights[1], weights[3]).chunk(3, -1)
    n = (n + (r + of_r).sigmoid() * of_n).tanh()
    return (n + (z + of_z).sigmoid() * (h - n),)


def _rnn(nonlinear: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def step(from_input: Tensor, state: State, weights: Any) -> State:
        return (nonlinear(from_input + linear(state[0], weights[1], weights[3])),)

    return step


_STEPS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn(torch.tanh), "rnn_relu": _rnn(torch.relu)}


def _pack_padded(
    function: Any,
    input: Tensor,  # noqa: A002 - torch's name
    lengths: Tensor,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    lengths = _shared(lengths, "pack_padded_sequence")
    with outside_transforms():
        _, sizes = function(torch.empty(input.shape[:2]), lengths, batch_first)
    x = input.transpose(0, 1) if batch_first else input
    return torch.cat([x[t, :n] for t, n in enumerate(sizes.tolist())]), sizes


def _pad_packed(
    function: Any,
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[Tensor, Tensor]:
    batch_sizes = _shared(batch_sizes, "pad_packed_sequence")
    with outside_transforms():
        form, lengths = function(
            torch.empty(len(data)), batch_sizes, batch_first, padding_value, total_length
        )
    sizes = batch_sizes.tolist()
    steps = torch.stack(_padded(data.split(sizes), padding_value, sizes[0]))
    (found,) = _padded([steps], padding_value, form.shape[batch_first])
    return found.transpose(0, 1) if batch_first else found, lengths


def _pad(
    function: Any,
    sequences: Sequence[Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Tensor:
    left = padding_side == "left"
    found = torch.stack(_padded(sequences, padding_value, max(map(len, sequences)), left=left))
    return found if batch_first else found.transpose(0, 1)


def _padded(
    tensors: Sequence[Tensor], value: float, length: int, *, left: bool = False
) -> list[Tensor]:
    """Return tensors with a first dimension of this length, filled up with a value."""
    found = []
    for x in tensors:
        missing = length - len(x)
        added = (missing, 0) if left else (0, missing)
        found.append(pad(x, (*(0, 0) * (x.ndim - 1), *added), value=value))
    return found


def _shared(lengths: Tensor, where: str) -> Tensor:
    """Return lengths outside all transforms; raise if each task has its own.

    Raises:
        HostReadError: The caller is traced.
    """
    if in_make_fx():
        raise packed_read()
    if is_batched(lengths):
        raise NotDifferentiableError(
            f"{where}: expected lengths that all tasks share, because they determine the shapes, "
            "got a batch of them; pass padded sequences and hide the padding by a mask, or run the "
            "tasks one after the other"
        )
    return below_transforms(lengths)


_PACKING: dict[str, Callable[..., Any]] = {
    "_pack_padded_sequence": _pack_padded,
    "_pad_packed_sequence": _pad_packed,
    "pad_sequence": _pad,
}

#: The operations by their names. They check less than torch's, which they call for lengths.
ELEMENTARY: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_STEPS, _layer),
    **{f"{name}_cell": _cell for name in _STEPS},
    **_PACKING,
}


def elementary(name: str | None, args: Any, kwargs: Any) -> Callable[..., Any] | None:
    """Return the function to call instead of an operation of torch; None if torch's works."""
    if name not in ELEMENTARY or not (is_transforming() or in_forward_mode()):
        return None
    needed = in_vmap() or name in _PACKING
    if not needed and name in _STEPS:
        # Of kernels other than those of the CPU, some have no forward mode.
        device = (*args, kwargs.get("input"))[0].device
        needed = is_packed(name, args, kwargs) or device.type != "cpu"
    return ELEMENTARY[name] if needed else None
