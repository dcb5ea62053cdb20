# SPDX-License-Identifier: Apache-2.0
"""evosax' OpenAI-ES on jax, one compiled generation: ask, evaluate, tell.

With plain gradient descent of step 1 and losses as they are, the mean moves by the estimate.
"""

from __future__ import annotations

import os
from typing import Any

# One thread for the arithmetic, like all rivals here.
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=1 "
    "intra_op_parallelism_threads=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import evosax
import jax
import jax.numpy as jnp
import numpy
import optax
from evosax.algorithms import Open_ES
from evosax.core.fitness_shaping import identity_fitness_shaping_fn

DISTRIBUTIONS = ("evosax", "jax", "jaxlib")
library = evosax


def loss(params: list[Any], x: Any, y: Any) -> Any:
    """Return the mean squared error of a network with tanh between its layers."""
    for k in range(0, len(params), 2):
        x = x @ params[k].T + params[k + 1]
        if k + 2 < len(params):
            x = jnp.tanh(x)
    return ((x - y) ** 2).mean()


def estimator(case: Any, weights: list[Any], x: Any, y: Any) -> Any:
    """Return a compiled generation."""
    params = [jnp.asarray(w) for w in weights]
    x, y = jnp.asarray(x), jnp.asarray(y)
    strategy = Open_ES(
        population_size=2 * case.samples,
        solution=params,
        optimizer=optax.sgd(1.0),
        std_schedule=lambda step: case.sigma,
        fitness_shaping_fn=identity_fitness_shaping_fn,
    )
    options = strategy.default_params
    key = jax.random.key(0)
    state = strategy.init(key, params, options)

    @jax.jit
    def generation(key: Any, state: Any) -> Any:
        first, second, following = jax.random.split(key, 3)
        population, asked = strategy.ask(first, state, options)
        losses = jax.vmap(loss, in_axes=(0, None, None))(population, x, y)
        told, _ = strategy.tell(second, population, losses, asked, options)
        return following, state.mean - told.mean

    keys = [key]

    def run() -> Any:
        keys[0], gradient = generation(keys[0], state)
        return numpy.asarray(gradient)

    return run
