# SPDX-License-Identifier: Apache-2.0
"""The decorator `zero_order`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchopt.diff.zero_order.directions import Directions
from torchopt.diff.zero_order.engine import ZeroOrder
from torchopt.diff.zero_order.estimators import Estimator
from torchopt.typing import Samplable, SampleFunc

__all__ = ["ZeroOrder", "zero_order"]


def zero_order(
    distribution: SampleFunc | Samplable | Directions,
    method: str | Estimator = "naive",
    argnums: int | tuple[int, ...] = (0,),
    num_samples: int = 1,
    sigma: float = 1.0,
    *,
    has_aux: bool = False,
    vector_output: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    vectorized: bool | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for functions whose gradient is estimated from their values.

    With directions z_i from `distribution`, of mean 0 and covariance I, the gradient is

        naive       1 / (sigma N)   sum_i f(theta + sigma z_i) z_i
        forward     1 / (sigma N)   sum_i (f(theta + sigma z_i) - f(theta)) z_i
        antithetic  1 / (2 sigma N) sum_i (f(theta + sigma z_i) - f(theta - sigma z_i)) z_i

    or that of another estimator of `torchopt.diff.zero_order.estimators`. For linear f with
    gradient a and Gaussian z, an antithetic pair has mean a and covariance norm(a)^2 I + a a'.

    The function runs once in the forward pass, which also draws the seed of the directions, so
    repeated backward passes give the same gradient. A backward pass evaluates the function in
    chunks by `torch.func.vmap`, and regenerates directions instead of storing them. Random numbers
    that the function draws (dropout) from torch's, Python's or numpy's generators are the same in
    the forward and the backward pass of a call.

    A backward pass evaluates the function with the buffers, training flags, numbers (counters) and
    random generators that its forward pass found in the arguments and the closure. Afterwards it
    restores the current ones, so only the forward pass has side effects. If something cannot be
    restored, the backward pass raises.

    Second derivatives (`create_graph=True`) are those of the smoothed function
    E f(theta + sigma z). They are estimated by Stein's identity from the same number of further
    evaluations, and so is the derivative in the cotangent. They need standard normal directions and
    one of the methods naive, forward, antithetic, central and leave_one_out. Their variance is
    larger by a factor of about D / sigma^2, where D is the number of entries.

    Under `torch.compile` the estimate is not part of the graph: the compiler breaks the graph
    before and after the call, so `fullgraph=True` raises. The estimators as pure functions of
    losses and noise, and an optimizer step on an estimate, compile as one graph.

    Args:
        distribution: A source of `torchopt.diff.zero_order.directions`, such as `Gaussian()`; or an
            object with a method `sample(shape)`, or a callable `f(shape)`. The latter two are
            called with the shape of each tensor and must draw from torch's generators. Samples
            should be spherically symmetric with unit variance.
        method: `"naive"`, `"forward"`, `"antithetic"`, another name of
            `torchopt.diff.zero_order.estimators.ESTIMATORS`, or an `Estimator`.
        argnums: Positions of the differentiated arguments, which are trees of floating-point or
            complex tensors. Other arguments get no gradient. A complex leaf is perturbed as a pair
            of real numbers, and `distribution` is called with `[*shape, 2]`.
        num_samples: N, the number of directions, >= 1.
        sigma: The size of the perturbation, > 0, in the units of the parameters.
        has_aux: Whether the function returns `(output, aux)`; aux is returned detached.
        vector_output: Whether the output is a tensor of any shape. The estimate is then the
            vector-Jacobian product, the gradient of the inner product of cotangent and output.
        generator: The generator that the seed is drawn from, in the forward pass; None: torch's CPU
            generator.
        chunk_size: How many directions are evaluated together; None: as many as keep the perturbed
            points and tensor arguments within 2**23 entries. It changes results only by rounding.
            Choose smaller chunks for functions with large intermediate results.
        vectorized: True: by vmap, or raise. False: in a loop. None: by vmap if that works, else in
            a loop, with one warning.

    Returns:
        A decorator. The decorated function takes any positional and keyword arguments. Its value is
        that of the function; an integer or bool is converted to a floating-point dtype. It can be
        used in `torch.autograd`, `torch.func.grad`, `vjp` and `vmap` (one call for each entry, with
        common directions).

    Raises:
        TypeError: `distribution` is neither callable nor has `sample`, or the output is not a
            tensor.
        RuntimeError: The output is not 0-dim and `vector_output` is False.
        ValueError: Another option is out of its range.
        NotDifferentiableError: A forward-mode or third derivative was requested, or a second one
            that is not defined; the function depends on tensors that require a gradient and are not
            among its arguments; or the state of the forward pass cannot be restored.
        UserWarning: A warning: sigma is below the resolution of a weight.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> @zero_order(torch.distributions.Normal(0.0, 1.0), "forward", num_samples=10_000)
        ... def f(x):
        ...     return (3.0 * x + 10.0).sum()
        >>> x = torch.zeros(2, requires_grad=True)
        >>> f(x).backward()
        >>> bool((x.grad - 3.0).abs().max() < 0.25)
        True

    References:
        Y. Nesterov, V. Spokoiny, Random Gradient-Free Minimization of Convex Functions, Foundations
        of Computational Mathematics 17, 2017, https://doi.org/10.1007/s10208-015-9296-2
    """
    return ZeroOrder(
        distribution,
        method,
        argnums,
        num_samples,
        sigma,
        has_aux=has_aux,
        vector_output=vector_output,
        generator=generator,
        chunk_size=chunk_size,
        vectorized=vectorized,
    )
