# SPDX-License-Identifier: Apache-2.0
"""Blocks of a model whose activations are computed again in the backward pass.

`torch.utils.checkpoint` frees nothing in forward over reverse mode: what it evicts are saved
tensors, and tangents are saved beside them. Here a block is one operation of the graph, which keeps
its inputs and their tangents and nothing else. With g(x; c) the vector-Jacobian product of the
block, and v and w the tangents of its inputs x and of the cotangent c, the tangent of g is

    d/dx <g(x; c), v> + g(x; w).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchopt.diff.closure import captured, require_arguments
from torchopt.diff.surroundings import Surroundings
from torchopt.diff.twice_differentiable import TwiceDifferentiable
from torchopt.params.swap import Swap
from torchopt.torch_internals import in_forward_mode
from torchopt.tree import is_smooth, tree_flatten, tree_unflatten
from torchopt.tree_function import apply_sweep

__all__ = ["find_blocks", "rematerialised"]

HIDDEN = "Pass it to the block, or name the blocks without this one, as in blocks=()."
_active = threading.local()
_lock = threading.Lock()
_patched: dict[int, tuple[int, Any]] = {}  # how often, and what stood there before


def find_blocks(loss: Any, names: Sequence[str] | None) -> list[nn.Module]:
    """Return the blocks of the modules that a loss reaches.

    Args:
        loss: The loss.
        names: Dotted names of blocks in these modules. None finds them: the members of each
            `nn.ModuleList` or `nn.Sequential` with at least two, all of one class and with
            parameters of the same names and shapes.

    Raises:
        ValueError: A name does not belong to any module.
    """
    modules = [x for _, x in captured(loss, nn.Module)]
    if names is None:
        found = [block for module in modules for block in _equal_blocks(module)]
    else:
        found = []
        for name in names:
            owners = [m for m in modules if name in dict(m.named_modules())]
            if not owners:
                raise ValueError(
                    f"inner_loop: blocks: expected names of sub-modules of what the loss calls, "
                    f"got {name!r}; see dict(module.named_modules())."
                )
            found.append(owners[0].get_submodule(name))
    unique = {id(block): block for block in found}
    inside = {id(x) for block in unique.values() for x in list(block.modules())[1:]}
    return [block for block in unique.values() if id(block) not in inside]


def _equal_blocks(module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return []
    forms = {
        (type(block), tuple((k, p.shape) for k, p in block.named_parameters())) for block in module
    }
    simple = isinstance(module[0], nn.ModuleDict) or not list(module[0].parameters())
    return [] if len(forms) > 1 or simple else list(module)


@contextlib.contextmanager
def rematerialised(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Return a context in which these blocks, called in this thread, keep only their inputs."""
    if not blocks:
        yield
        return
    with _lock:
        for block in blocks:
            count, present = _patched.get(id(block), (0, block.__dict__.get("forward")))
            if not count:
                block.__dict__["forward"] = _Wrapped(block, block.forward)
            _patched[id(block)] = count + 1, present
    before = getattr(_active, "on", False)
    _active.on = True
    try:
        yield
    finally:
        _active.on = before
        with _lock:
            for block in blocks:
                count, present = _patched.pop(id(block))
                if count > 1:
                    _patched[id(block)] = count - 1, present
                elif present is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = present


class _Wrapped:
    """The forward of a block, in one operation."""

    not_searched = True

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._block, self._forward = block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_active, "on", False) or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs), none_is_leaf=True)
        where = [i for i, x in enumerate(leaves) if is_smooth(x)]
        names, params = zip(*self._block.named_parameters())
        tensors = [*(leaves[i] for i in where), *params]

        def function(*inner: Tensor) -> Any:
            filled = list(leaves)
            for i, x in zip(where, inner):
                filled[i] = x
            rebuilt: Any = tree_unflatten(spec, filled)
            given, named = rebuilt
            with Swap(self._block, dict(zip(names, inner[len(where) :]))):
                return self._forward(*given, **named)

        seen = Surroundings(self._forward, beside=()).retaken()
        return _remade(function, tensors, seen)


def _remade(function: Callable[..., Any], tensors: Sequence[Tensor], seen: Surroundings) -> Any:
    pairs = [forward_ad.unpack_dual(x) if _level() else (x, None) for x in tensors]
    # Not under no_grad, which stops tangents: nothing here requires a gradient.
    inner = [x.detach() if t is None else forward_ad.make_dual(x.detach(), t) for x, t in pairs]
    out, spec = tree_flatten(function(*inner), none_is_leaf=True)
    found = _tensors(out)
    values = [forward_ad.unpack_dual(y) if _level() else (y, None) for y in found]
    block = _Block(function, [t for _, t in pairs], [y.detach() for y, _ in values], seen)
    outputs = [
        y if tangent is None else forward_ad.make_dual(y, tangent)
        for y, (_, tangent) in zip(apply_sweep(block, *(x for x, _ in pairs)), values)
    ]
    remaining = iter(outputs)
    return tree_unflatten(spec, [next(remaining) if isinstance(y, Tensor) else y for y in out])


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor)]


def _level() -> bool:
    return in_forward_mode()


class _Block:
    """One call of a block, as `torchopt.tree_function.Sweep` wants it."""

    def __init__(
        self,
        function: Callable[..., Any],
        tangents: list[Tensor | None],
        values: list[Tensor],
        seen: Surroundings,
    ) -> None:
        self._function, self._tangents, self._values = function, tangents, values
        self._seen = seen

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the results that were computed already."""
        values, self._values = self._values, []
        return tuple(values)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs, with their tangents.

        By reverse over reverse mode, within the block: with duals, tangents and what they were
        computed from would hold each other until the forward mode ends.
        """
        present = [i for i, c in enumerate(cotangents) if c is not None]
        pairs = [_parts(cotangents[i]) for i in present]
        with torch.enable_grad(), self._seen.replayed():
            leaves = [x.detach().requires_grad_() for x in inputs]
            with TwiceDifferentiable():
                result = self._function(*leaves)
            out, _ = tree_flatten(result, none_is_leaf=True)
            results = _tensors(out)
            used = [results[i] for i in present]
            require_arguments(used, leaves, self._function, "inner_loop: blocks", HIDDEN)
            curved = any(t is not None for t in self._tangents)
            found = torch.autograd.grad(
                used,
                leaves,
                [c for c, _ in pairs],
                create_graph=curved,
                retain_graph=True,
                allow_unused=True,
            )
            terms = [(y, t) for y, (_, t) in zip(used, pairs) if t is not None]
            terms += [
                (g, t)
                for g, t in zip(found, self._tangents)
                if g is not None and t is not None and g.requires_grad
            ]
            if not terms:
                return tuple(None if g is None else g.detach() for g in found)
            pushed = torch.autograd.grad(
                [y for y, _ in terms], leaves, [t for _, t in terms], allow_unused=True
            )
        return tuple(
            None if g is None else g.detach() if t is None else forward_ad.make_dual(g.detach(), t)
            for g, t in zip(found, pushed)
        )


def _parts(x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert x is not None
    return forward_ad.unpack_dual(x) if _level() else (x, None)
