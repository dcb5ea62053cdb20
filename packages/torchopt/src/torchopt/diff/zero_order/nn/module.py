# SPDX-License-Identifier: Apache-2.0
"""A module whose parameters get gradients estimated from the values of `forward`."""

from __future__ import annotations

import functools
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.zero_order.directions import FromDistribution
from torchopt.diff.zero_order.engine import ZeroOrder
from torchopt.diff.zero_order.estimators import Estimator, as_estimator
from torchopt.diff.zero_order.evaluator import Evaluator
from torchopt.params.functional import functional_call
from torchopt.tree_function import is_transforming
from torchopt.typing import Samplable, Size

__all__ = ["ZeroOrderGradientModule", "enable_zero_order_gradients"]


class ZeroOrderGradientModule(nn.Module, Samplable):
    """A module with a scalar `forward` that need not be differentiable.

    Subclasses define `forward(*input, **kwargs)`, which returns a 0-dim tensor, and
    `sample(sample_shape)`, which returns random directions of mean 0 and unit covariance. The
    parameters that require gradients get estimated gradients; inputs get none. The options are
    keywords of the class statement and are inherited::

        class Loss(ZeroOrderGradientModule, method="forward", num_samples=100, sigma=0.01): ...

    The forward pass runs `forward` once, with its side effects, so BatchNorm updates its statistics
    once. Perturbed evaluations use copies of the buffers as the forward pass found them, and its
    training mode and counters; they have no side effects. Dropout draws one mask for a call and
    uses it in all perturbed evaluations of its backward pass, so that they differ only by the
    perturbation.

    Args:
        method: Keyword of the class: as in `torchopt.diff.zero_order.zero_order`.
        num_samples: Keyword of the class: the number of directions in each backward pass.
        sigma: Keyword of the class: the size of the perturbation, > 0.
        chunk_size: Keyword of the class: how many directions are evaluated together.
        vectorized: Keyword of the class: whether to evaluate by vmap.

    Raises:
        RuntimeError: The module has no parameters, or its output is not 0-dim.
        TypeError: The output is not a tensor.

    Example:
        >>> class Sign(ZeroOrderGradientModule, method="antithetic", num_samples=4000):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.tensor([2.0, -1.0]))
        ...     def forward(self, x):
        ...         return torch.sign(self.w - x).sum()  # no useful derivative
        ...     def sample(self, sample_shape=torch.Size()):
        ...         return torch.randn(sample_shape)
        >>> _ = torch.manual_seed(0)
        >>> module = Sign()
        >>> module(torch.zeros(2)).backward()
        >>> bool((module.w.grad > 0).all())
        True
    """

    def __init_subclass__(
        cls,
        method: str | Estimator | None = None,
        num_samples: int | None = None,
        sigma: float | None = None,
        chunk_size: int | None = None,
        vectorized: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        given = {
            "method": method,
            "num_samples": num_samples,
            "sigma": sigma,
            "chunk_size": chunk_size,
            "vectorized": vectorized,
        }
        options: dict[str, Any] = dict(getattr(cls, "_zero_order_options", {}))
        options.update({name: value for name, value in given.items() if value is not None})
        cls._zero_order_options = options
        own = cls.__dict__.get("forward")
        if own is None:
            inherited = getattr(cls.forward, "_zero_order_forward", None)
            if inherited is None or all(value is None for value in given.values()):
                return
            cls.forward = inherited  # type: ignore[method-assign]
        elif getattr(own, "__isabstractmethod__", False):
            return
        enable_zero_order_gradients(cls, **options)

    _zero_order_options: dict[str, Any]

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, a 0-dim tensor."""
        raise NotImplementedError

    @abstractmethod
    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 - immutable
        """Return a random direction of shape `sample_shape`, drawn from torch's generators."""
        raise NotImplementedError


class _Shell(nn.Module):
    """Calls a function on a module.

    So `functional_call` can swap the module's tensors without calling the module itself.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)


_local = threading.local()


def _evaluated() -> set[int]:
    """Return the ids of the modules that are being evaluated in this thread."""
    found: set[int] = _local.__dict__.setdefault("modules", set())
    return found


def enable_zero_order_gradients(
    cls: type[ZeroOrderGradientModule],
    method: str | Estimator = "naive",
    num_samples: int = 1,
    sigma: float = 1.0,
    chunk_size: int | None = None,
    vectorized: bool | None = None,
) -> type[ZeroOrderGradientModule]:
    """Wrap `cls.forward` so that its derivative is estimated; return `cls`.

    Raises:
        TypeError: `forward` is already wrapped.
        ValueError: An option is out of its range.
    """
    original: Callable[..., Any] = cls.forward
    if hasattr(original, "_zero_order_forward"):
        raise TypeError(
            "Zero-order gradient estimation is already enabled for the `forward` method."
        )
    estimator = as_estimator(method)

    def engine_of(module: ZeroOrderGradientModule) -> ZeroOrder:
        return ZeroOrder(
            FromDistribution(module.sample),
            estimator,
            (0,),
            num_samples,
            sigma,
            chunk_size=chunk_size,
            vectorized=vectorized,
        )

    # So that wrong options raise when the class is defined.
    ZeroOrder(torch.randn, estimator, (0,), num_samples, sigma, chunk_size=chunk_size)

    @functools.wraps(original)
    def forward(self: ZeroOrderGradientModule, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _evaluated():
            # A call of `super().forward(...)` in an evaluation that is already running.
            return original(self, *args, **kwargs)
        params = dict(self.named_parameters())
        if not params:
            raise RuntimeError("The module has no parameters.")
        trainable = {name: p for name, p in params.items() if p.requires_grad}
        if not trainable:
            return original(self, *args, **kwargs)
        evaluator = self.__dict__.setdefault("_zero_order_evaluator", Evaluator(vectorized))
        buffers = dict(self.named_buffers())
        kept = torch.is_grad_enabled() or is_transforming()

        def call(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            swapped = {f"module.{name}": x for name, x in tensors.items()}
            _evaluated().add(id(self))
            try:
                return functional_call(_Shell(self, original), swapped, args, kwargs)
            finally:
                _evaluated().discard(id(self))

        def perturbed(copies: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
            tensors, *rest = args
            return call({**tensors, **dict(zip(buffers, copies))}, *rest, **kwargs)

        return engine_of(self).run(
            call,
            evaluator,
            (trainable, *args),
            kwargs,
            perturbed=perturbed,
            # Copies, since `forward` and later calls may write to the buffers.
            scratch=tuple(x.detach().clone() if kept else x for x in buffers.values()),
        )

    forward._zero_order_forward = original  # type: ignore[attr-defined]
    cls.forward = forward  # type: ignore[method-assign]
    return cls
