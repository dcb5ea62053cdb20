# SPDX-License-Identifier: Apache-2.0
"""jaxopt on the CPU, compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
from jaxopt import implicit_diff, linear_solve

jax.config.update("jax_enable_x64", True)
DISTRIBUTIONS = ("jaxopt", "jax")
library: Any = jaxopt


def _compiled(function: Any, *args: Any) -> Any:
    compiled = jax.jit(function)
    arrays = [jnp.asarray(x) for x in args]
    return lambda: np.asarray(jax.block_until_ready(compiled(*arrays)))


def logistic_loss(w: Any, theta: Any, X: Any, y: Any) -> Any:
    """Return the objective of the logistic problem."""
    logits = X @ w
    fit = jnp.sum(jnp.logaddexp(0.0, logits) - y * logits)
    return fit + 0.5 * jnp.sum(jnp.exp(theta) * w * w)


def logistic(problem: Any) -> Any:
    """Differentiate the given minimum by conjugate gradients."""
    solve_cg = partial(linear_solve.solve_cg, tol=1e-8)

    @implicit_diff.custom_root(jax.grad(logistic_loss), solve=solve_cg)
    def solve(w: Any, theta: Any, X: Any, y: Any) -> Any:
        return w

    def gradient(theta: Any, w: Any, X: Any, y: Any, v: Any) -> Any:
        return jax.grad(lambda theta: solve(w, theta, X, y) @ v)(theta)

    return _compiled(gradient, *(problem[name] for name in ("theta", "w", "X", "y", "v")))


def equilibrium(problem: Any) -> Any:
    """Solve by plain iteration and differentiate by normal conjugate gradients."""
    return _equilibrium(
        problem, jaxopt.FixedPointIteration, partial(linear_solve.solve_normal_cg, tol=1e-8)
    )


def anderson(problem: Any) -> Any:
    """Solve by Anderson's mixing and differentiate by GMRES."""
    return _equilibrium(
        problem, jaxopt.AndersonAcceleration, partial(linear_solve.solve_gmres, tol=1e-8)
    )


def _equilibrium(problem: Any, make: Any, solve: Any) -> Any:
    def layer(z: Any, x: Any, W: Any) -> Any:
        return jnp.tanh(z @ W.T + x)

    solver = make(layer, maxiter=1000, tol=1e-9, implicit_diff_solve=solve)

    def gradient(x: Any, W: Any, v: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(solver.run(jnp.zeros_like(x), x, W).params * v))(x)

    return _compiled(gradient, *(problem[name] for name in ("x", "W", "v")))


def small_ridge(problem: Any) -> Any:
    """Solve and differentiate all at once, by vmap."""

    def residual(w: Any, theta: Any, X: Any, y: Any) -> Any:
        return X.T @ (X @ w - y) / 20 + jnp.exp(theta) * w

    @implicit_diff.custom_root(residual, solve=linear_solve.solve_cholesky)
    def ridge(w: Any, theta: Any, X: Any, y: Any) -> Any:
        A = X.T @ X / 20 + jnp.exp(theta) * jnp.eye(5)
        return jnp.linalg.solve(A, X.T @ y / 20)

    def one(theta: Any, X: Any, y: Any, v: Any) -> Any:
        return ridge(jnp.zeros(5), theta, X, y) @ v

    gradient = jax.vmap(jax.grad(one))
    return _compiled(gradient, *(problem[name] for name in ("theta", "X", "y", "v")))
