# SPDX-License-Identifier: Apache-2.0
"""Call a module with other parameters, also where activations are recomputed in backward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from torchopt.errors import NotDifferentiableError

__all__ = ["functional_call"]


class _Swaps(threading.local):
    """The modules that hold other tensors at the moment, outermost first."""

    def __init__(self) -> None:
        self.active: list[tuple[nn.Module, dict[str, Tensor], bool, bool]] = []


_swaps = _Swaps()
_install_lock = threading.Lock()
_installed = False


@contextlib.contextmanager
def _swapped(
    module: nn.Module, tensors: dict[str, Tensor], tie_weights: bool, strict: bool
) -> Iterator[None]:
    entry = (module, tensors, tie_weights, strict)
    with _reparametrize_module(module, tensors, tie_weights=tie_weights, strict=strict):
        _swaps.active.append(entry)
        try:
            yield
        finally:
            _swaps.active.remove(entry)


class _AllSwapped:
    """Enters swaps again, and then the recomputation's own context, as often as asked.

    A graph that is differentiated twice is recomputed twice, under the same context object.
    """

    def __init__(
        self, entries: list[tuple[nn.Module, dict[str, Tensor], bool, bool]], then: Any
    ) -> None:
        self._entries = entries
        self._then = then
        self._open: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for entry in self._entries:
                stack.enter_context(_swapped(*entry))
            stack.enter_context(self._then)
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool:
        return bool(self._open.pop().__exit__(*error))


def _install() -> None:
    """Let torch's checkpoint remember the swaps it ran under. Does nothing where there is no swap.

    The two functions below are looked up by `torch.utils.checkpoint.checkpoint` at each call, so
    that models which imported it by name are served as well.
    """
    global _installed
    with _install_lock:
        if _installed:
            return
        original: Callable[..., Any] = torch_checkpoint._checkpoint_without_reentrant_generator
        reentrant = torch_checkpoint.CheckpointFunction

        def generator(
            fn: Any,
            preserve_rng_state: bool = True,
            context_fn: Any = torch_checkpoint.noop_context_fn,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if not _swaps.active:
                return original(fn, preserve_rng_state, context_fn, *args, **kwargs)
            entries = list(_swaps.active)

            def contexts() -> tuple[Any, Any]:
                forward, recompute = context_fn()
                return forward, _AllSwapped(entries, recompute)

            return original(fn, preserve_rng_state, contexts, *args, **kwargs)

        class CheckpointFunction(reentrant):  # type: ignore[misc, valid-type]
            """Refuses to run while a module holds other tensors."""

            @classmethod
            def apply(cls, *args: Any, **kwargs: Any) -> Any:
                if _swaps.active:
                    raise NotDifferentiableError(
                        "functional_call: the module uses torch.utils.checkpoint with "
                        "use_reentrant=True, which would recompute with the module's own "
                        "parameters and gives no gradients to torch.autograd.grad; expected "
                        "use_reentrant=False (in transformers: gradient_checkpointing_enable("
                        "gradient_checkpointing_kwargs={'use_reentrant': False}))."
                    )
                return reentrant.apply(*args, **kwargs)

        torch_checkpoint._checkpoint_without_reentrant_generator = generator
        torch_checkpoint.CheckpointFunction = CheckpointFunction  # type: ignore[misc]
        _installed = True


def functional_call(
    module: nn.Module,
    parameters_and_buffers: Mapping[str, Tensor] | tuple[Mapping[str, Tensor], ...],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Return `module(*args, **kwargs)` with other parameters and buffers.

    Same as `torch.func.functional_call`, and right under activation checkpointing: there, the
    backward pass recomputes activations after the module has its own parameters back, and
    `torch.func.functional_call` then gives gradients of another function without a warning. Here
    the recomputation sees the tensors of the call.

    Args:
        module: The module.
        parameters_and_buffers: Tensors by dotted name, or a tuple of such mappings.
        args: The positional arguments; what is no tuple is the only argument.
        kwargs: The keyword arguments.
        tie_weights: A name stands for all names of a tied parameter.
        strict: Refuse names that are missing or unknown.

    Raises:
        NotDifferentiableError: The module uses `torch.utils.checkpoint` with `use_reentrant=True`,
            which cannot be differentiated this way.
        RuntimeError: With `strict`, names that are missing or unknown.
        ValueError: A name occurs in two of the mappings.

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
        twice = tensors.keys() & mapping.keys()
        if twice:
            raise ValueError(f"functional_call: {sorted(twice)} occur in two of the mappings")
        tensors.update(mapping)
    if not isinstance(args, tuple):
        args = (args,)
    if not torch.compiler.is_compiling():
        _install()
        with _swapped(module, tensors, tie_weights, strict):
            return module(*args, **(kwargs or {}))
    # The compiler traces torch's own; it keeps or recomputes activations by itself.
    return torch.func.functional_call(
        module, tensors, args, dict(kwargs or {}), tie_weights=tie_weights, strict=strict
    )
