# SPDX-License-Identifier: Apache-2.0
"""Functional calls under activation checkpointing, and the check for second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from torchopt.errors import NotDifferentiableError, SecondDerivativeWarning
from torchopt.params.containers import named_submodules
from torchopt.params.functional import functional_call
from torchopt.params.second_order import check_second_order
from torchopt.params.swap import Swap


class Blocks(nn.Module):
    """Two layers that are recomputed in the backward pass, or not."""

    def __init__(self, reentrant: bool | None, nested: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double()
        self.reentrant = reentrant
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:

            def block(y: Tensor, layer: nn.Module = layer) -> Tensor:
                return torch.tanh(layer(torch.sin(y)))

            def outer(y: Tensor, block: Any = block) -> Tensor:
                return torch.cos(checkpoint(block, y, use_reentrant=False))

            def plain(y: Tensor, block: Any = block) -> Tensor:
                return torch.cos(block(y))

            if self.reentrant is None:
                x = plain(x) if self.nested else block(x)
            else:
                x = checkpoint(outer if self.nested else block, x, use_reentrant=self.reentrant)
        return x


def weights_and_input() -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    params = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, p in Blocks(None).named_parameters()
    }
    return params, torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("nested", [False, True])
def test_gradients_under_checkpointing_are_those_without(nested: bool) -> None:
    results = []
    params, x = weights_and_input()
    for reentrant in (None, False):
        torch.manual_seed(0)
        net = Blocks(reentrant, nested)
        out = functional_call(net, params, (x,)).pow(3).sum()
        results.append(torch.autograd.grad(out, [*params.values(), x]))
    for exact, recomputed in zip(*results):
        assert torch.equal(exact, recomputed)


def test_an_inner_loop_under_checkpointing_has_the_right_meta_gradient() -> None:
    results = []
    start, x = weights_and_input()
    for reentrant in (None, False):
        torch.manual_seed(0)
        net = Blocks(reentrant)
        params = dict(start)
        for _ in range(2):
            loss = functional_call(net, params, (x,)).pow(2).sum()
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads)}
        outer = functional_call(net, params, (x,)).pow(2).sum()
        results.append(torch.autograd.grad(outer, list(start.values())))
    for exact, recomputed in zip(*results):
        torch.testing.assert_close(exact, recomputed, rtol=1e-13, atol=1e-14)


def test_the_module_keeps_its_own_parameters_and_plain_checkpoints_work() -> None:
    params, x = weights_and_input()
    net = Blocks(False)
    own = list(net.parameters())
    functional_call(net, params, x).sum().backward()
    assert all(p is q and p.grad is None for p, q in zip(net.parameters(), own))
    assert all(p.grad is not None for p in params.values())
    got = torch.autograd.grad(net(x).sum(), own)
    net.reentrant = None
    expected = torch.autograd.grad(net(x).sum(), own)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))
    net.reentrant = True
    net(x).sum().backward()  # outside a functional call nothing is refused
    assert torch.equal(own[0].grad, expected[0])


def test_reentrant_checkpoints_are_refused() -> None:
    params, x = weights_and_input()
    with pytest.raises(NotDifferentiableError, match="use_reentrant=True.*expected use_reentrant"):
        functional_call(Blocks(True), params, (x,))


def test_arguments_of_functional_call() -> None:
    net = nn.BatchNorm1d(2)
    x = torch.randn(4, 2)
    buffers = {"running_mean": torch.ones(2), "running_var": torch.ones(2)}
    net.eval()
    got = functional_call(net, ({"weight": torch.full((2,), 2.0)}, buffers), x)
    torch.testing.assert_close(got, 2 * (x - 1) / (1 + 1e-5) ** 0.5)
    with pytest.raises(ValueError, match=r"\['weight'\] occur in two"):
        functional_call(net, ({"weight": x}, {"weight": x}), x)
    with pytest.raises(RuntimeError, match="Missing key"):
        functional_call(net, {"weight": torch.ones(2)}, x, strict=True)


def attention(params: dict[str, Tensor]) -> Tensor:
    q = params["q"].reshape(1, 1, 4, 8)
    return nn.functional.scaled_dot_product_attention(q, q, q).pow(2).sum()


def test_fused_attention_is_named_with_its_remedy() -> None:
    params = {"q": torch.randn(32, requires_grad=True)}
    for loss in (attention, attention(params)):
        message = r"attention\w* has no second derivative.*SDPBackend\.MATH"
        with pytest.raises(NotDifferentiableError, match=message):
            check_second_order(loss, params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check_second_order(attention, params)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].exp()


def test_once_differentiable_functions_are_named_with_their_remedy() -> None:
    w = torch.randn(3, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="drop @once_differentiable"):
        check_second_order(OnceOnly.apply(w).sum(), w)


def test_recurrent_layers_need_the_plain_kernel_in_forward_mode() -> None:
    net = nn.LSTM(3, 2)
    x = torch.randn(4, 1, 3)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, params, (x,))[0].pow(2).sum()

    params = dict(net.named_parameters())
    check_second_order(loss(params), params)
    if torch.backends.mkldnn.is_available():
        message = r"torch refuses to compute it in forward over reverse.*mkldnn.flags"
        with pytest.warns(SecondDerivativeWarning, match=message):
            found = check_second_order(loss, params)
        assert found is not None
        assert found.forward is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TF32 on other devices
        with torch.backends.mkldnn.flags(enabled=False):
            check_second_order(loss, params)


def test_checkpoints_that_cannot_be_differentiated_twice_are_named_with_their_remedy() -> None:
    w = torch.randn(3, requires_grad=True)

    def loss(p: Tensor, reentrant: bool) -> Tensor:
        return checkpoint(torch.sin, p, use_reentrant=reentrant).sum()

    found = check_second_order(lambda p: loss(p, False), w)
    assert found is not None
    assert found.forward is not None
    with pytest.raises(NotDifferentiableError, match="Remedy: .*use_reentrant=False"):
        check_second_order(lambda p: loss(p, True), w)


def symmetric(w: Tensor) -> Tensor:
    matrix = w[:9].reshape(3, 3)
    return matrix @ matrix.mT + torch.eye(3)


def attended(w: Tensor) -> Tensor:
    torch.manual_seed(0)
    x = w.view(3, 1, 4)
    attended: Tensor = nn.MultiheadAttention(4, 2)(x, x, x)[0]
    return attended


def gated(w: Tensor) -> Tensor:
    torch.manual_seed(0)
    states: Tensor = nn.GRU(3, 2)(w.view(4, 1, 3))[0]  # on the CPU only LSTM has a fused kernel
    return states


def in_autocast(w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (w.view(4, 3) @ torch.ones(3, 2)).float()


FINE: dict[str, Callable[[Tensor], Tensor]] = {
    "attention with weights": attended,
    "autocast": in_autocast,
    "gated recurrent unit": gated,
    "convolution": lambda w: nn.functional.conv2d(torch.ones(1, 1, 5, 5), w[:9].view(1, 1, 3, 3)),
    "layer norm": lambda w: nn.functional.layer_norm(w, (12,)),
    "batch norm": lambda w: nn.functional.batch_norm(w.view(4, 3), None, None, training=True),
    "cross entropy": lambda w: nn.functional.cross_entropy(
        w.view(4, 3), torch.tensor([0, 1, 2, 0])
    ),
    "embedding": lambda w: nn.functional.embedding(torch.tensor([0, 2, 1]), w.view(4, 3)),
    "average pooling": lambda w: nn.functional.avg_pool1d(w.view(1, 1, 12), 3),
    "max pooling": lambda w: nn.functional.max_pool1d(w.view(1, 1, 12), 3),
    "gelu": nn.functional.gelu,
    "solve": lambda w: torch.linalg.solve(symmetric(w), torch.ones(3)),
    "cholesky": lambda w: torch.linalg.cholesky(symmetric(w)),
    "eigh": lambda w: torch.linalg.eigh(symmetric(w))[0],
    "interpolate": lambda w: nn.functional.interpolate(w.view(1, 1, 12), 24, mode="linear"),
}


@pytest.mark.parametrize("name", sorted(FINE))
def test_operations_with_second_derivatives_pass(name: str) -> None:
    w = torch.linspace(-1, 1.3, 12, requires_grad=True)
    check_second_order(lambda p: FINE[name](p).pow(2).sum(), w)


def test_bad_losses_are_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="expected a 0-dim tensor or a function"):
        check_second_order(3.0, w)  # type: ignore[arg-type]
    with pytest.raises(NotDifferentiableError, match="has no graph"):
        check_second_order(torch.ones(()), w)
    with pytest.raises(NotDifferentiableError, match="does not depend on any"):
        check_second_order(torch.ones((), requires_grad=True) * 2, w)
    check_second_order(w.sum(), w)  # linear: the second derivative is zero


class Holds(nn.Module):
    """A module with a parameter and a tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))
        self.scale = torch.tensor(2.0)

    def forward(self, log: list[float]) -> Any:
        try:
            for _ in range(3):
                yield self.w * self.scale
        finally:
            log.append((self.w * self.scale).item())


def test_a_context_that_is_entered_twice_restores_the_state_of_each_entry() -> None:
    net = Holds()
    swap = Swap(net, {"w": torch.tensor(3.0), "scale": torch.tensor(5.0)})
    with swap:
        net.scale = torch.tensor(7.0)
        with swap:
            assert (net.w.item(), net.scale.item()) == (3.0, 5.0)
        assert (net.w.item(), net.scale.item()) == (3.0, 7.0)
    assert (net.w.item(), net.scale.item()) == (1.0, 2.0)


@pytest.mark.parametrize("end", ["close", "throw", "exhaust"])
def test_a_forward_that_yields_ends_with_the_tensors_that_it_began_with(end: str) -> None:
    net, log = Holds(), list[float]()
    steps = functional_call(net, {"w": torch.tensor(3.0)}, (log,))
    assert next(steps).item() == 6.0
    assert net.w.item() == 1.0
    if end == "close":
        steps.close()
    elif end == "throw":
        with pytest.raises(KeyError, match="stop"):
            steps.throw(KeyError("stop"))
    else:
        assert [x.item() for x in steps] == [6.0, 6.0]
    assert log == [6.0]
    assert net.w.item() == 1.0


class Hides(nn.Sequential):
    """Yields no module but itself."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        yield "", self


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Tanh())),
        Hides(Hides()),
        nn.Sequential(Hides(nn.Linear(1, 1)), nn.Linear(1, 1)),
    ],
)
def test_submodules_are_those_that_the_module_names(module: nn.Module) -> None:
    assert named_submodules(module) == list(module.named_modules())
