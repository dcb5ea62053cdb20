# SPDX-License-Identifier: Apache-2.0
"""Recomputed blocks have the gradient of the unrolled loop, with tasks too."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torchopt
from torchopt.diff.explicit import products
from torchopt.diff.explicit.products import Products
from torchopt.errors import NotDifferentiableError
from torchopt.params.swap import Swap

functional = nn.functional
WIDTH = 32


class Attends(nn.Module):
    """A block of a transformer, with dropout and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.back = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide, self.drop = nn.Linear(WIDTH, 40), nn.Dropout(0.3)
        self.narrow = nn.Linear(40, WIDTH)
        self.turn = nn.Parameter(torch.randn(WIDTH, WIDTH) / 10)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = self.heads(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0)
        q, k, v = heads.transpose(-3, -2)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.back(seen.transpose(-3, -2).flatten(-2))
        return x + self.narrow(self.drop(functional.gelu(self.wide(x)))) + (x @ self.turn).tanh()


class InPlace(nn.Module):
    """Changes its products in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh_())
        y += x
        return y.mul_(1.1)


class Tied(nn.Module):
    """Uses one parameter in several ways, and a part of its input as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        y = self.layer(self.layer(x).tanh()) @ weight + functional.linear(x, weight.T.sin())
        return y * self.layer(x.detach()).sigmoid()


class Pair(nn.Module):
    """Takes a tuple and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = pair
        return x + self.first(y).tanh(), y * self.second(x).sigmoid()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        def inside(z: Tensor) -> Tensor:
            return self.second(self.first(z).tanh())

        found: Tensor = checkpoint(inside, x, use_reentrant=False)
        return x + found


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pair = x, x.sin()
        for block in self.blocks:
            pair = block(pair)
        return pair[0] * pair[1]


def of(block: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(block(), block())


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 40, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


class Learns(nn.Module):
    """Takes a step on its own weight, with a loss of its input."""

    functional = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 10)

    def forward(self, x: Tensor) -> Tensor:
        def value(weight: Tensor) -> Tensor:
            return (x @ weight).sin().square().sum()

        if self.functional:
            slope: Tensor = torch.func.grad(value)(self.weight)
        else:
            (slope,) = torch.autograd.grad(value(self.weight), self.weight, create_graph=True)
        return x + (x @ (self.weight - 0.1 * slope)).tanh()


NETS: dict[str, Callable[[], nn.Module]] = {
    "attention": of(Attends),
    "in place": of(InPlace),
    "a parameter used twice": of(Tied),
    "tuples": Pairs,
    "a checkpoint": of(Checkpointed),
    "an encoder of torch": encoder,
}
# in_dims of params, batch and scale
TASKS: dict[str, Any] = {
    "one task": None,
    "tasks": (None, 0, None),
    "tasks with their own parameters": (0, 0, 0),
    "tasks that differ in the loss": (None, None, 0),
}


def gradients(net: nn.Module, loss: Any, tasks: Any, batch: Any, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    params = {k: p.detach().clone() for k, p in net.named_parameters()}
    scale = torch.tensor(1.3, dtype=torch.float64)
    if tasks is not None:
        if tasks[0] is not None:
            params = {k: torch.stack([p, p + p.sin() / 9]) for k, p in params.items()}
        if tasks[2] is not None:
            scale = torch.tensor([1.3, 0.8], dtype=torch.float64)
    inputs = [scale, *params.values()]
    for x in inputs:
        x.requires_grad_()
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, tasks=tasks, **options)
    result = inner(params, batch, scale)
    total = result.losses.sum() + sum(p.pow(3).sum() for p in result.params.values())
    return list(torch.autograd.grad(total, inputs))


def require_close(expected: list[Tensor], found: list[Tensor]) -> None:
    for x, y in zip(expected, found):
        assert x.norm() > 1e-8
        assert (x - y).norm() <= 1e-12 * x.norm()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("of_tasks", TASKS)
@pytest.mark.parametrize("name", NETS)
def test_blocks_have_the_gradient_of_the_plain_loop(name: str, of_tasks: str) -> None:
    torch.manual_seed(0)
    net, tasks = NETS[name]().double(), TASKS[of_tasks]

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    batch = draw(2, 3, 4, WIDTH) if tasks is not None and tasks[1] == 0 else draw(3, 4, WIDTH)
    expected = gradients(net, loss, tasks, batch)
    for keep in ("steps", 1):
        require_close(expected, gradients(net, loss, tasks, batch, derivative="mixed", keep=keep))


def test_a_mask_of_each_task_reaches_the_blocks() -> None:
    torch.manual_seed(0)
    first, second = Attends().double(), Attends().double()
    net = nn.ModuleList([first, second])
    mask = torch.rand(2, 4, 4) > 0.4
    mask |= torch.eye(4, dtype=torch.bool)

    def loss(p: Any, batch: Any, scale: Tensor) -> Tensor:
        def run(x: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = second(first(x, mask), mask=mask)
            return out

        with Swap(net, p):
            return (run(*batch) * scale).square().mean()

    batch, tasks = (draw(2, 3, 4, WIDTH), mask), (None, 0, None)
    expected = gradients(net, loss, tasks, batch)
    require_close(expected, gradients(net, loss, tasks, batch, derivative="mixed"))


@pytest.mark.parametrize("graph", [False, True])
def test_a_gradient_in_the_loss_goes_through_blocks(graph: bool) -> None:
    torch.manual_seed(0)
    net = of(InPlace)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        value = torchopt.params.functional_call(net, p, batch * scale).square().mean()
        found = torch.autograd.grad(value, list(p.values()), create_graph=graph, retain_graph=True)
        return value * (1 + sum(x.square().sum() for x in found))

    expected = gradients(net, loss, None, draw(3, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(3, WIDTH), derivative="mixed"))


def test_a_block_may_take_a_gradient_itself() -> None:
    torch.manual_seed(0)
    net = of(Learns)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    expected = gradients(net, loss, None, draw(3, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(3, WIDTH), derivative="mixed"))
    net[0].functional = False
    with pytest.raises(NotDifferentiableError, match=r"take gradients by torch\.func\.grad"):
        gradients(net, loss, None, draw(3, WIDTH), derivative="mixed")


def test_a_checkpoint_around_blocks_is_right() -> None:
    torch.manual_seed(0)
    net = of(Attends)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            out: Tensor = torchopt.params.functional_call(net, p, x)
            return out * scale

        found: Tensor = checkpoint(inside, batch, use_reentrant=False)
        return found.square().mean()

    expected = gradients(net, loss, None, draw(3, 4, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(3, 4, WIDTH), derivative="mixed"))


def test_products_are_saved_and_unneeded_slopes_are_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: list[Callable[[], bool]] = []
    again = products._Product.again

    def counted(self: Any, *args: Any) -> Tensor:
        found = again(self, *args)
        known.append(args[2])
        return found

    monkeypatch.setattr(products._Product, "again", counted)
    torch.manual_seed(0)
    net = of(Attends)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    gradients(net, loss, None, draw(3, 40, WIDTH), derivative="mixed")
    taken = [is_known() for is_known in known]
    # Five products with parameters, and the product of attention weights and values, in each of two
    # blocks and steps: saved for the step, and for the part that flows through the losses. The
    # tangent of the last one is saved too.
    assert taken.count(False) == (6 * 2 + 1) * 2 * 2
    assert taken.count(True) == 5 * 2 * 2  # without derivatives of parameters


class Constant(nn.Module):
    """Has two products of one form, of which one has no tangent in forward mode."""

    target: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 10)
        self.register_buffer("target", torch.randn(WIDTH, WIDTH) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh() + (x.detach().sin() @ self.target).tanh() * x


def test_products_of_one_form_are_distinguished() -> None:
    torch.manual_seed(0)
    net = of(Constant)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    expected = gradients(net, loss, None, draw(5, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(5, WIDTH), derivative="mixed"))


class CountProducts(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm")
        return func(*args, **(kwargs or {}))


def test_a_tangent_that_is_kept_saves_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, 96), nn.Tanh(), nn.Linear(96, WIDTH))
    net = nn.Sequential(*(nn.Sequential(*deepcopy(layers)) for _ in range(2))).double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    found, counts = [], []
    for kept in (True, False):
        monkeypatch.setattr(products, "is_zero_tensor", lambda x, kept=kept: not kept)
        with CountProducts() as products_of_run:
            found.append(gradients(net, loss, None, draw(5, WIDTH), derivative="mixed"))
        counts.append(products_of_run.count)
    require_close(*found)
    # Of the second layer of each of two blocks, whose results are smaller than what they are of.
    assert counts[1] - counts[0] == 2 * 2 * 2


def test_a_block_may_take_another_branch() -> None:
    kept = Products()
    a, b = draw(40, WIDTH), draw(WIDTH, 5)
    with kept:
        first = a @ b
    with kept.again(()):
        torch.testing.assert_close(a[:2] @ b, first[:2])
        torch.testing.assert_close(a @ b, first)


def computed(p: Any, scale: Tensor) -> Any:
    """Return parameters whose cotangents are differentiated, and not only passed on."""
    return {k: x * scale * x.cos() for k, x in p.items()}


@pytest.mark.parametrize("way", ["eager", "trace"])
def test_parameters_of_blocks_may_be_computed(way: str) -> None:
    torch.manual_seed(0)
    net = of(Tied)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, computed(p, scale), batch)
        return out.square().mean()

    expected = gradients(net, loss, None, draw(5, WIDTH))
    found = gradients(net, loss, None, draw(5, WIDTH), derivative="mixed", execute=way)
    require_close(expected, found)


class _Scaled(torch.autograd.Function):
    """x * cos(x), with a tensor under the name that the end of a graph has for its leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = x.detach()
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x.cos()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * (x.cos() - x * x.sin())

    jvp = backward


@pytest.mark.parametrize("blocks", [(), None])
def test_a_function_whose_context_has_a_variable_is_no_leaf(blocks: Any) -> None:
    torch.manual_seed(0)
    net = of(Tied)().double()

    def loss_with(scaled: Any) -> Any:
        def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
            params = {k: scaled(x) for k, x in p.items()}
            out: Tensor = torchopt.params.functional_call(net, params, batch)
            return (out * scale).square().mean()

        return loss

    plain = loss_with(lambda x: x * x.cos())
    expected = gradients(net, plain, None, draw(5, WIDTH))
    for options in ({}, {"derivative": "mixed", "blocks": blocks}):
        found = gradients(net, loss_with(_Scaled.apply), None, draw(5, WIDTH), **options)
        require_close(expected, found)


def test_a_counter_of_operations_sees_blocks() -> None:
    torch.manual_seed(0)
    net = of(InPlace)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    counts = []
    for blocks in ((), None):
        with FlopCounterMode(display=False) as counter:
            gradients(net, loss, None, draw(5, WIDTH), derivative="mixed", blocks=blocks)
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] < counts[1] < 2 * counts[0]
