# SPDX-License-Identifier: Apache-2.0
"""Learned optimizers: update rules that are small networks, one network for all coordinates.

A learned optimizer is a `GradientTransformation` with weights, a dictionary of tensors.
`torchopt.inner_loop`, evolution strategies or any other engine can train these weights. The steps
consist of plain torch operations. They are differentiable to any order in the weights, gradients,
states and parameters, and run under `torch.func.vmap`.

| optimizer | reads | state of a coordinate |
|---|---|---|
| `learned_mlp` | gradient, parameter, moments, their ratios, the step count | 7 numbers |
| `learned_lstm` | the gradient, as logarithm and sign | 2 numbers per layer and hidden unit |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.precision import widened
from torchopt.shown import shown
from torchopt.transform.base import LeafRule, as_transformation
from torchopt.transform.counts import increment, zero_counts

__all__ = [
    "LearnedLSTMState",
    "LearnedMLPState",
    "learned_lstm",
    "learned_mlp",
    "lstm_weights",
    "mlp_weights",
]

#: Decays of the momenta and of the second moment of `learned_mlp`.
DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
SECOND = 0.999
#: Time scales of `learned_mlp`: it reads tanh(t / scale - 1).
TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0)
FEATURES = 5 + 2 * len(DECAYS) + len(TIMES)
Weights = dict[str, Tensor]


class LearnedMLPState(NamedTuple):
    """The state of `learned_mlp`.

    Attributes:
        count: The number of steps of each parameter, 0-dim.
        momenta: For each parameter `[6, *shape]`, averages of the gradient. Their bias is corrected
            in the features.
        second: For each parameter, the average of the squared gradient.
    """

    count: Any
    momenta: Any
    second: Any


class LearnedLSTMState(NamedTuple):
    """The state of `learned_lstm`: `hidden` and `cell`, `[layers, *shape, hidden]` each."""

    hidden: Any
    cell: Any


torch.serialization.add_safe_globals([LearnedMLPState, LearnedLSTMState])


def mlp_weights(
    hidden: Sequence[int] = (32, 32),
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Weights:
    """Return initial weights for `learned_mlp`, with which its steps are small.

    Args:
        hidden: Number of units of each hidden layer.
        generator: The generator of random numbers; None for torch's own.
        dtype: The dtype of the weights; None for torch's default.

    Raises:
        ValueError: A number is not an integer >= 1.
    """
    _require_sizes(hidden, "mlp_weights: hidden")
    sizes = [FEATURES, *hidden, 2]
    weights = {}
    for k, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        scale = (0.1 if k == len(hidden) else 1.0) / fan_in**0.5
        w = _drawn(fan_in, fan_out, generator=generator, dtype=dtype)
        weights[f"w{k}"] = scale * w
        weights[f"b{k}"] = w.new_zeros(fan_out)
    return weights


def lstm_weights(
    hidden: int = 20,
    layers: int = 2,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Weights:
    """Return initial weights for `learned_lstm`, with which its steps are small.

    Args:
        hidden: Number of units of each layer.
        layers: Number of layers.
        generator: The generator of random numbers; None for torch's own.
        dtype: The dtype of the weights; None for torch's default.

    Raises:
        ValueError: A number is not an integer >= 1.
    """
    _require_sizes([hidden, layers], "lstm_weights: hidden, layers")
    weights = {}
    for k in range(layers):
        fan_in = (hidden if k else 2) + hidden
        w = _drawn(fan_in, 4 * hidden, generator=generator, dtype=dtype)
        weights[f"w{k}"] = w / fan_in**0.5
        bias = w.new_zeros(4 * hidden)
        bias[hidden : 2 * hidden] = 1.0  # the forget gate is open at first
        weights[f"b{k}"] = bias
    weights["out"] = _drawn(hidden, 1, generator=generator, dtype=dtype) / hidden**0.5
    return weights


def learned_mlp(
    weights: Weights, *, step_scale: float | Tensor = 1e-3, exponent_scale: float | Tensor = 1e-3
) -> GradientTransformation:
    r"""Return the optimizer whose update of each coordinate is a network of its statistics.

    .. math::
        u = \lambda_1 \, d \, \exp(\lambda_2 \, m), \qquad (d, m) = \mathrm{MLP}(\text{features})

    There are 28 features. The gradient, the parameter, the root of the second moment, its inverse,
    and six momenta with decays from 0.1 to 0.9999 are each divided by their root mean square over
    the tensor. The gradient and the momenta divided by the root of the second moment are used as
    they are. The others are eleven functions tanh(t / s - 1) of the step count t.

    Args:
        weights: Weights from `mlp_weights`, or trained ones. They are differentiated.
        step_scale: lambda_1, in the unit of the parameters. It is differentiated.
        exponent_scale: lambda_2, dimensionless. It is differentiated.

    Returns:
        The transformation. `update` needs `params`, and writes to none of its inputs.

    Raises:
        AssertionError: From `update`, when it is called without `params`.
        TypeError: The weights are not a dictionary.
        ValueError: The weights do not have the names and shapes of such a network.

    References:
        L. Metz, N. Maheswaranathan, J. Nixon, C. D. Freeman, J. Sohl-Dickstein, Understanding and
        correcting pathologies in the training of learned optimizers, ICML 2019,
        https://arxiv.org/abs/1810.10180 (the network, the momenta and the functions of time)

        L. Metz, C. D. Freeman, J. Harrison, N. Maheswaranathan, J. Sohl-Dickstein, Practical
        tradeoffs between memory, compute, and performance in learned optimizers, CoLLAs 2022,
        https://arxiv.org/abs/2203.11860 (the second moment and its ratios)

    Example:
        >>> import torch, torchopt
        >>> from torchopt.optimizers.learned import learned_mlp, mlp_weights
        >>> weights = mlp_weights((8,), generator=torch.Generator().manual_seed(0))
        >>> weights = {name: w.requires_grad_() for name, w in weights.items()}
        >>> loop = torchopt.inner_loop(lambda x, batch: (x**2).sum(), learned_mlp, steps=5)
        >>> x = loop(torch.ones(3), weights=weights).params
        >>> slopes = torch.autograd.grad((x**2).sum(), list(weights.values()))
        >>> [tuple(s.shape) for s in slopes]
        [(28, 8), (8,), (8, 2), (2,)]
    """
    _require_weights(weights, "learned_mlp")
    _require_layers(weights, FEATURES, "learned_mlp")
    rule = LearnedMLP(weights, step_scale, exponent_scale)
    return as_transformation(rule, already_flattened=False)


def learned_lstm(weights: Weights, *, step_scale: float | Tensor = 0.1) -> GradientTransformation:
    r"""Return the optimizer whose update of each coordinate is the output of an LSTM.

    The network reads the gradient as (log|g| / 10, sign g) if |g| >= exp(-10), and as
    (-1, exp(10) g) otherwise. The update is lambda times a linear function of the last layer.

    Args:
        weights: Weights from `lstm_weights`, or trained ones. They are differentiated.
        step_scale: lambda, in the unit of the parameters. It is differentiated.

    Returns:
        The transformation. `update` writes to none of its inputs.

    Raises:
        TypeError: The weights are not a dictionary.
        ValueError: The weights do not have the names and shapes of such a network.

    References:
        M. Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016,
        section 2.1 and appendix A, https://arxiv.org/abs/1606.04474

    Example:
        >>> import torch, torchopt
        >>> from torchopt.optimizers.learned import learned_lstm, lstm_weights
        >>> optimizer = learned_lstm(lstm_weights(4, generator=torch.Generator().manual_seed(0)))
        >>> params = {"w": torch.ones(3, 2)}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"w": torch.ones(3, 2)}, state)
        >>> updates["w"].shape, state.hidden["w"].shape
        (torch.Size([3, 2]), torch.Size([2, 3, 2, 4]))
    """
    _require_weights(weights, "learned_lstm")
    hidden = weights["out"].shape[0] if "out" in weights else 0
    for k in range(max(1, _count(weights))):
        expected = ((hidden if k else 2) + hidden, 4 * hidden)
        _require_shape(weights, f"w{k}", expected, "learned_lstm")
        _require_shape(weights, f"b{k}", expected[1:], "learned_lstm")
    _require_shape(weights, "out", (hidden, 1), "learned_lstm")
    return as_transformation(LearnedLSTM(weights, step_scale), already_flattened=False)


def _drawn(*shape: int, generator: torch.Generator | None, dtype: torch.dtype | None) -> Tensor:
    """Return normal numbers on the default device, or on that of a generator off the CPU."""
    if generator is None:
        return torch.randn(*shape, dtype=dtype)
    x = torch.randn(*shape, generator=generator, dtype=dtype, device=generator.device)
    return x.to(torch.get_default_device()) if generator.device.type == "cpu" else x


def _require_sizes(sizes: Any, what: str) -> None:
    if not (isinstance(sizes, Sequence) and all(isinstance(n, int) and n >= 1 for n in sizes)):
        raise ValueError(f"{what}: expected counts of at least 1, got {shown(sizes)}")


def _require_weights(weights: Any, what: str) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"{what}: weights: expected a dict of tensors, got {type(weights).__name__}; make them "
            "with mlp_weights or lstm_weights"
        )


def _require_shape(weights: Weights, name: str, shape: tuple[int, ...], what: str) -> None:
    given = weights.get(name)
    got: Any = "nothing" if given is None else type(given).__name__
    if isinstance(given, Tensor):
        got = tuple(given.shape) if given.is_floating_point() else given.dtype
    if got != shape:
        raise ValueError(
            f"{what}: weights[{name!r}]: expected a tensor of shape {shape}, got {got}; "
            "make them with mlp_weights or lstm_weights"
        )


def _require_layers(weights: Weights, fan_in: int, what: str) -> None:
    layers = max(1, _count(weights))
    for k in range(layers):
        known = weights.get(f"w{k}")
        fan_out = 2
        if k < layers - 1 and isinstance(known, Tensor) and known.ndim == 2:
            fan_out = known.shape[1]
        _require_shape(weights, f"w{k}", (fan_in, fan_out), what)
        _require_shape(weights, f"b{k}", (fan_out,), what)
        fan_in = fan_out


def _count(weights: Weights) -> int:
    """Return the number of layers."""
    return sum(name.startswith("w") for name in weights)


def _as_pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _require_state(state: Tensor, shape: tuple[int, ...]) -> None:
    if state.shape != shape:  # torch could broadcast it; the caller names the leaf
        raise RuntimeError("the state of another tensor")


@dataclass(frozen=True, eq=False)
class LearnedMLP(LeafRule):
    """The rule of `learned_mlp`."""

    weights: Weights
    step_scale: float | Tensor
    exponent_scale: float | Tensor

    leaf_fields: ClassVar[tuple[str, ...]] = ("count", "momenta", "second")
    reads_params: ClassVar[bool] = True

    def init_leaves(self, params: list[Tensor]) -> LearnedMLPState:
        """Return zeros."""
        real = [_as_pairs(x) for x in params]
        return LearnedMLPState(
            zero_counts(params),
            [x.new_zeros(len(DECAYS), *x.shape) for x in real],
            [torch.zeros_like(x) for x in real],
        )

    def update_leaves(
        self, grads: list[Tensor], state: LearnedMLPState, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], LearnedMLPState]:
        """Return the updates and the next state."""
        del inplace
        count = increment(state.count)
        each = zip(count, grads, params, state.momenta, state.second)
        found = [self._leaf(*one) for one in each]
        updates, momenta, second = (list(column) for column in zip(*found)) if found else ([],) * 3
        return updates, LearnedMLPState(count, momenta, second)

    def _leaf(
        self, count: Tensor, g: Tensor, p: Tensor, momenta: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _require_state(momenta, (len(DECAYS), *g.shape))
        t = count.to(g.dtype)
        decays = torch.tensor(DECAYS, dtype=g.dtype, device=g.device)
        column = decays.reshape(-1, *(1,) * g.ndim)
        momenta = column * momenta + (1 - column) * g
        second = SECOND * second + (1 - SECOND) * g * g
        unbiased = momenta / (1 - column**t)
        root = torch.sqrt(second / (1 - SECOND**t) + 1e-16)
        ratios = unbiased / root
        sized = torch.cat([torch.stack([g, p, root, 1 / root]), unbiased])
        mean = sized.square().reshape(len(sized), -1).mean(1)
        sized = sized / torch.sqrt(mean + 1e-16).reshape(-1, *(1,) * g.ndim)
        times = torch.tanh(t / torch.tensor(TIMES, dtype=g.dtype, device=g.device) - 1)
        times = times.reshape(-1, *(1,) * g.ndim).expand(len(TIMES), *g.shape)
        x = torch.cat([sized, ratios, g[None] / root, times]).movedim(0, -1)
        x = self._network(x)
        step = self.step_scale * x[..., 0] * torch.exp(self.exponent_scale * x[..., 1])
        return step.to(g.dtype), momenta, second

    def _network(self, x: Tensor) -> Tensor:
        layers = _count(self.weights)
        for k in range(layers):
            w, b = (widened(self.weights[f"{name}{k}"]) for name in "wb")
            x = x.to(w.dtype) @ w + b
            if k < layers - 1:
                x = torch.relu(x)
        return x


@dataclass(frozen=True, eq=False)
class LearnedLSTM(LeafRule):
    """The rule of `learned_lstm`."""

    weights: Weights
    step_scale: float | Tensor

    leaf_fields: ClassVar[tuple[str, ...]] = ("hidden", "cell")

    def init_leaves(self, params: list[Tensor]) -> LearnedLSTMState:
        """Return zeros in the dtype of the weights."""
        out, layers = self.weights["out"], _count(self.weights)

        def zeros() -> list[Tensor]:
            real = [_as_pairs(x) for x in params]
            return [x.new_zeros(layers, *x.shape, len(out), dtype=out.dtype) for x in real]

        return LearnedLSTMState(zeros(), zeros())

    def update_leaves(
        self, grads: list[Tensor], state: LearnedLSTMState, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], LearnedLSTMState]:
        """Return the updates and the next state."""
        del params, inplace
        weights = {name: widened(w) for name, w in self.weights.items()}
        found = [self._leaf(weights, *one) for one in zip(grads, state.hidden, state.cell)]
        updates, hidden, cell = (list(column) for column in zip(*found)) if found else ([],) * 3
        return updates, LearnedLSTMState(hidden, cell)

    def _leaf(
        self, weights: Weights, g: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = weights["out"]
        _require_state(hidden, (_count(weights), *g.shape, len(out)))
        hidden, cell = hidden.to(out.dtype), cell.to(out.dtype)
        size = g.abs()
        large = size >= math.exp(-10)
        log = torch.log(torch.where(large, size, 1.0)) / 10
        x = torch.stack(
            [torch.where(large, log, -1.0), torch.where(large, g.sign(), math.exp(10) * g)], dim=-1
        )
        hiddens, cells = [], []
        for k, (h, c) in enumerate(zip(hidden, cell)):
            both = torch.cat([x.to(h.dtype), h], dim=-1)
            gates = both @ weights[f"w{k}"] + weights[f"b{k}"]
            enter, keep, leave, new = gates.chunk(4, dim=-1)
            c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
            x = torch.sigmoid(leave) * torch.tanh(c)
            hiddens.append(x)
            cells.append(c)
        step = self.step_scale * (x @ out)[..., 0]
        return step.to(g.dtype), torch.stack(hiddens), torch.stack(cells)
