# SPDX-License-Identifier: Apache-2.0
"""optimistix on the CPU, compiled. It has no decorator, so it solves from the given start too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix

jax.config.update("jax_enable_x64", True)
DISTRIBUTIONS = ("optimistix", "lineax", "jax")
library: Any = optimistix


def _compiled(function: Any, *args: Any) -> Any:
    compiled = jax.jit(function)
    arrays = [jnp.asarray(x) for x in args]
    return lambda: np.asarray(jax.block_until_ready(compiled(*arrays)))


def logistic(problem: Any) -> Any:
    """Find the root from the minimum by Newton's method, differentiate by conjugate gradients."""
    X, y = jnp.asarray(problem["X"]), jnp.asarray(problem["y"])
    linear = lineax.CG(rtol=1e-8, atol=1e-8)
    solver = optimistix.Newton(rtol=1e-8, atol=1e-8, linear_solver=linear)
    tags = frozenset({lineax.positive_semidefinite_tag})

    def loss(w: Any, theta: Any) -> Any:
        logits = X @ w
        fit = jnp.sum(jnp.logaddexp(0.0, logits) - y * logits)
        return fit + 0.5 * jnp.sum(jnp.exp(theta) * w * w)

    def gradient(theta: Any, w: Any, v: Any) -> Any:
        def outer(theta: Any) -> Any:
            found = optimistix.root_find(
                jax.grad(loss),
                solver,
                w,
                theta,
                adjoint=optimistix.ImplicitAdjoint(linear),
                tags=tags,
            )
            return found.value @ v

        return jax.grad(outer)(theta)

    return _compiled(gradient, *(problem[name] for name in ("theta", "w", "v")))


def equilibrium(problem: Any) -> Any:
    """Solve by plain iteration and differentiate by GMRES."""
    solver = optimistix.FixedPointIteration(rtol=1e-9, atol=1e-9)
    adjoint = optimistix.ImplicitAdjoint(lineax.GMRES(rtol=1e-8, atol=1e-8))

    def gradient(x: Any, W: Any, v: Any) -> Any:
        def outer(x: Any) -> Any:
            found = optimistix.fixed_point(
                lambda z, x: jnp.tanh(z @ W.T + x),
                solver,
                jnp.zeros_like(x),
                x,
                adjoint=adjoint,
                max_steps=1000,
            )
            return jnp.sum(found.value * v)

        return jax.grad(outer)(x)

    return _compiled(gradient, *(problem[name] for name in ("x", "W", "v")))


def small_ridge(problem: Any) -> Any:
    """Solve by Newton's method and differentiate all at once, by vmap."""
    solver = optimistix.Newton(rtol=1e-8, atol=1e-8)

    def residual(w: Any, args: Any) -> Any:
        theta, X, y = args
        return X.T @ (X @ w - y) / 20 + jnp.exp(theta) * w

    def one(theta: Any, X: Any, y: Any, v: Any) -> Any:
        return optimistix.root_find(residual, solver, jnp.zeros(5), (theta, X, y)).value @ v

    gradient = jax.vmap(jax.grad(one))
    return _compiled(gradient, *(problem[name] for name in ("theta", "X", "y", "v")))
