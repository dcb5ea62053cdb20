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
    """Return a decorator that gives a function a gradient estimated from its values.

    With directions z_i from `distribution`, of mean 0 and covariance I, the gradient is

        naive       1 / (sigma N)   sum_i f(theta + sigma z_i) z_i
        forward     1 / (sigma N)   sum_i (f(theta + sigma z_i) - f(theta)) z_i
        antithetic  1 / (2 sigma N) sum_i (f(theta + sigma z_i) - f(theta - sigma z_i)) z_i

    or that of any other estimator of `torchopt.diff.zero_order.estimators`. For linear f with
    gradient a and Gaussian z, an antithetic pair has mean a and covariance norm(a)^2 I + a a'.

    The function runs once in the forward pass, where the seed of the directions is drawn: the
    backward pass gives the same gradient however often it runs. It evaluates the function in chunks
    by `torch.func.vmap` and regenerates directions instead of storing them. Random draws inside the
    function (dropout) are common to a call, its forward and its backward pass; they are those of
    torch's, Python's and numpy's generators.

    A backward pass belongs to its call. It evaluates the function with the buffers, training flags,
    numbers (counters) and random generators that the function found in the forward pass, in its
    arguments and in what it reaches by closure, and puts back what was there before: only the
    forward pass has side effects. What cannot be put back is refused.

    Second derivatives (`create_graph=True`) are those of the smoothed function
    E f(theta + sigma z), estimated by Stein's identity from as many evaluations again, along with
    the derivative in the cotangent. They need standard normal directions and one of the methods
    naive, forward, antithetic, central and leave_one_out; their variance is larger by about
    D / sigma^2.

    Under `torch.compile` the estimate is left out of the graph: the compiler breaks the graph
    before and after the call, so `fullgraph=True` raises. The estimators as pure functions of
    losses and noise, and an optimizer step on an estimate, compile as one graph.

    Args:
        distribution: An object with a method `sample(shape)` or a callable `f(shape)`, called with
            the shape of each tensor and drawing from torch's generators; or a source of
            `torchopt.diff.zero_order.directions`, such as `Gaussian()`. Spherically symmetric with
            unit variance.
        method: `"naive"`, `"forward"`, `"antithetic"`, another name of
            `torchopt.diff.zero_order.estimators.ESTIMATORS`, or an `Estimator`.
        argnums: Positions of the differentiated arguments, trees of floating-point or complex
            tensors. No other argument gets a gradient. A complex leaf is perturbed as a pair of
            real numbers, and `distribution` is asked for `[*shape, 2]`.
        num_samples: N >= 1, number of directions.
        sigma: > 0, size of the perturbation, in the units of the parameters.
        has_aux: The function returns `(output, aux)`; aux comes back detached.
        vector_output: The output is a tensor of any shape. The estimate is then the
            vector-Jacobian product: the gradient of the inner product of cotangent and output.
        generator: Where the seed is drawn, in the forward pass; default: torch's CPU generator.
        chunk_size: Directions evaluated at once; None: as many as keep the perturbed points and
            tensor arguments within 2**23 entries. Results depend on it only by rounding. Smaller
            chunks for functions with large intermediate results.
        vectorized: True: by vmap, or raise. False: in a loop. None: by vmap, or, with one warning,
            in a loop.

    Returns:
        A decorator. The decorated function takes any arguments, keywords too; its value is that of
        the function, of a floating-point dtype where the function returns an integer or a bool.
        It can be used in `torch.autograd`, `torch.func.grad`, `vjp` and `vmap` (one
        call for each entry, with common directions).

    Raises:
        TypeError: `distribution` is neither callable nor has `sample`; the output is not a tensor.
        RuntimeError: The output is not 0-dim and `vector_output` is False.
        ValueError: Another option is out of its range.
        NotDifferentiableError: A forward-mode derivative was requested, a third one, or a second
            one where it is not defined; the function depends on tensors that require a gradient and
            are not among its arguments; or what the forward pass found is gone.
        UserWarning: As a warning: sigma is below the resolution of a weight.

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
        of Computational Mathematics 17, 2017.
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
