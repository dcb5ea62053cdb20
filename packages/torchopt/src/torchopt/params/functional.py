# SPDX-License-Identifier: Apache-2.0
"""Call a module with other parameters; correct for recomputed activations too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.params.swap import Swap, resumed

__all__ = ["functional_call"]


def functional_call(
    module: nn.Module,
    parameters_and_buffers: Mapping[str, Tensor] | tuple[Mapping[str, Tensor], ...],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Return `module(*args, **kwargs)`, computed with other parameters and buffers.

    Like `torch.func.functional_call`, but also correct under activation checkpointing. There, the
    backward pass recomputes activations after the module has got its own parameters back, so
    `torch.func.functional_call` silently returns the gradients of another function. Here the
    recomputation uses the tensors of the call.

    Args:
        module: The module.
        parameters_and_buffers: A mapping from dotted names to tensors, or a tuple of such mappings.
            Names that are not given keep the module's own tensors. If it is a mutable mapping,
            buffers that the call replaces are written back to it.
        args: A tuple of positional arguments, or a single argument.
        kwargs: The keyword arguments.
        tie_weights: Whether one name of a tied parameter sets the parameter under all its names.
        strict: Whether names that are missing or unknown raise.

    Returns:
        The result of the module. A generator runs each of its steps with the given tensors.

    Raises:
        NotDifferentiableError: The module uses `torch.utils.checkpoint` with `use_reentrant=True`,
            which cannot be differentiated this way.
        RuntimeError: `strict` is True, and names are missing or unknown.
        TypeError: The parameters are not a mapping, a value is not a tensor, or `forward` is
            asynchronous.
        ValueError: A name occurs in two of the mappings, or tied parameters got different tensors.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> functional_call(net, {"weight": torch.tensor([[1.0, 2.0]])}, torch.ones(1, 2))
        tensor([[3.]])
    """
    mappings = (
        parameters_and_buffers
        if isinstance(parameters_and_buffers, tuple)
        else (parameters_and_buffers,)
    )
    tensors: dict[str, Tensor] = {}
    for mapping in mappings:
        if not isinstance(mapping, Mapping):
            raise TypeError(
                "functional_call(module, parameters_and_buffers, args): expected a mapping from "
                f"names to tensors, got {type(mapping).__name__}; pass one such as "
                "dict(module.named_parameters())"
            )
        twice = tensors.keys() & mapping.keys()
        if twice:
            raise ValueError(f"functional_call: {sorted(twice)} occur in two of the mappings")
        tensors.update(mapping)
    if not isinstance(args, tuple):
        args = (args,)
    if torch.compiler.is_compiling():
        # The compiler can trace torch's function, and saves or recomputes activations itself.
        return torch.func.functional_call(
            module, tensors, args, dict(kwargs or {}), tie_weights=tie_weights, strict=strict
        )
    swap = Swap(module, tensors, tie_weights=tie_weights, strict=strict, allow_missing=True)
    with swap:
        out = module(*args, **(kwargs or {}))
    if isinstance(parameters_and_buffers, MutableMapping):
        # Buffers that the module replaced, such as counters.
        held = swap.held()
        parameters_and_buffers.update({name: held[name] for name in tensors if name in held})
    if inspect.isgenerator(out):
        return resumed(swap, out)
    if inspect.iscoroutine(out) or inspect.isasyncgen(out):
        raise TypeError(
            f"functional_call: {type(module).__name__}.forward is asynchronous and would run "
            "after the call, with the module's own tensors; expected a function."
        )
    return out
