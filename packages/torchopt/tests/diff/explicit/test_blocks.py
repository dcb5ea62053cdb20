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
from torchopt.diff.explicit import block_code, blocks, compiled_block, products
from torchopt.diff.explicit.products import Products
from torchopt.diff.explicit.trace import Kept, ready
from torchopt.errors import CompilerError, NotDifferentiableError, NotTraceableError
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


class InView(InPlace):
    """Changes a product through a view of it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        y.view(-1).mul_(1.1)
        z: Tensor = self.second(y.tanh())
        z.view(-1).sin_()
        return x + z.tanh()


class Tied(nn.Module):
    """Uses one parameter in several ways, and a part of its input as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        y = self.layer(self.layer(x).tanh()) @ weight + functional.linear(x, weight.T.sin())
        return y * self.layer(x.detach()).sigmoid()


class Shares(nn.Module):
    """Has one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).tanh()).tanh()


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


class Shows(nn.Module):
    """Returns a product, and something computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y.tanh()


class Writes(nn.Module):
    """Changes a product that a block returned in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shows() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y, z = block(x)
            x = y.mul_(0.5) + z
        return x


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
    "in place by a view": of(InView),
    "a parameter used twice": of(Tied),
    "a parameter under two names": of(Shares),
    "tuples": Pairs,
    "results changed in place": Writes,
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


def penalized(net: nn.Module, graph: bool) -> Any:
    """Return a loss that contains its own gradient, with its graph or as a constant."""

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        value = torchopt.params.functional_call(net, p, batch * scale).square().mean()
        found = torch.autograd.grad(value, list(p.values()), create_graph=graph, retain_graph=True)
        return value * (1 + sum(x.square().sum() for x in found))

    return loss


@pytest.mark.parametrize("graph", [False, True])
def test_a_gradient_in_the_loss_goes_through_blocks(graph: bool) -> None:
    torch.manual_seed(0)
    net = of(InPlace)().double()

    loss = penalized(net, graph)
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


LAYOUTS = {
    "rows": lambda: draw(WIDTH, 24),
    "columns": lambda: draw(24, WIDTH).mT,
    "one column": lambda: draw(WIDTH, 1),
    "every second": lambda: draw(WIDTH, 48)[:, ::2],
    "overlapping columns": lambda: draw(2 * WIDTH).as_strided((WIDTH, 24), (1, 1)),
    "distant columns": lambda: draw(24, 2 * WIDTH).mT[:WIDTH],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cotangents_of_a_kept_product_have_the_bits_of_torch(layout: str) -> None:
    kept = Products()
    a, b = (x.requires_grad_() for x in (draw(300, WIDTH), LAYOUTS[layout]().detach()))
    with kept:
        expected = a @ b
    cotangent = torch.sin(expected.detach())
    with kept.again(()):
        found = a @ b
    assert torch.equal(found, expected)
    assert found.grad_fn is not None
    assert found.grad_fn.name() != expected.grad_fn.name()  # not computed again
    for x, y in zip(*(torch.autograd.grad(out, (a, b), cotangent) for out in (found, expected))):
        assert torch.equal(x, y)


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
    for chosen in ((), None):
        with FlopCounterMode(display=False) as counter:
            gradients(net, loss, None, draw(5, WIDTH), derivative="mixed", blocks=chosen)
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] < counts[1] < 2 * counts[0]


class Quiet(Attends):
    """Without dropout, and with a buffer and a number among its arguments."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None, times: float = 1.5) -> Tensor:
        return super().forward(x + self.shift * times, mask)


BLOCKS: dict[str, Any] = {"derivative": "mixed", "execute": "blocks"}


class Deep(nn.Module):
    """Four equal blocks after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Quiet() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> Kept[Any]:
    """Return an empty cache of the programs of blocks, in the place of the present one."""
    found: Kept[Any] = Kept()
    monkeypatch.setattr(compiled_block, "_codes", found)
    return found


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, codes: Kept[Any]) -> Kept[Any]:
    """Run the graphs of blocks operation by operation; return their cache."""
    monkeypatch.setattr(block_code, "ready", lambda *given, compiled: ready(*given, compiled=False))
    return codes


@pytest.mark.slow
def test_compiled_blocks_have_the_gradient_of_the_plain_loop(codes: Kept[Any]) -> None:
    torch.manual_seed(0)
    net = Deep().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    expected = gradients(net, loss, None, draw(3, 4, WIDTH))
    for keep in ("all", "steps", 1):
        require_close(expected, gradients(net, loss, None, draw(3, 4, WIDTH), keep=keep, **BLOCKS))
    # The first derivative, and that in forward over reverse mode, of all blocks.
    assert codes.made == 2
    expected = gradients(net, loss, None, draw(2, 5, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(2, 5, WIDTH), **BLOCKS))
    assert codes.made == 4  # of another shape


def adam(lr: float) -> Any:
    return torchopt.adam(lr, eps=1e-3)  # a smaller one makes much of rounding errors


@pytest.mark.parametrize(("optimizer", "window"), [(torchopt.sgd, 2), (adam, None)])
def test_blocks_as_programs_have_the_gradient_of_the_plain_loop(
    optimizer: Any, window: int | None, uncompiled: Kept[Any]
) -> None:
    torch.manual_seed(0)
    net = Deep().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    def found(**options: Any) -> tuple[Tensor, ...]:
        params = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
        scale, batch = torch.tensor(1.3, dtype=torch.float64), draw(3, 4, WIDTH)
        inputs = [*params.values(), scale.requires_grad_(), batch.requires_grad_()]
        inner = torchopt.inner_loop(loss, optimizer(0.1), steps=3, window=window, **options)
        result = inner(params, batch, scale)
        total = result.losses.sum() + sum(p.pow(3).sum() for p in result.params.values())
        return torch.autograd.grad(total, inputs, materialize_grads=True)

    expected = found()
    for keep in ("all", "steps", 1, 2):
        for x, y in zip(expected, found(keep=keep, **BLOCKS)):
            assert (x - y).norm() <= 1e-12 * x.norm()
    assert uncompiled.made == 2


@pytest.mark.parametrize("name", [x for x in NETS if x != "attention"])
def test_all_sorts_of_blocks_as_programs(name: str, uncompiled: Kept[Any]) -> None:
    torch.manual_seed(0)
    net = NETS[name]().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    expected = gradients(net, loss, None, draw(3, 4, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(3, 4, WIDTH), **BLOCKS))
    assert uncompiled.made


def test_blocks_as_programs_with_computed_parameters(uncompiled: Kept[Any]) -> None:
    torch.manual_seed(0)
    net = of(Quiet)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, computed(p, scale), batch)
        out += 1  # what a block returns may be changed in place
        return out.square().mean()

    expected = gradients(net, loss, None, draw(3, 4, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(3, 4, WIDTH), **BLOCKS))
    assert uncompiled.made


def test_blocks_of_meta_parameters_as_programs(uncompiled: Kept[Any]) -> None:
    # Nothing that these blocks take has a tangent, but the cotangents of their results do.
    torch.manual_seed(0)
    net = of(Quiet)().double()
    names = [name for name, _ in net.named_parameters()]

    def loss(head: Tensor, batch: Tensor, *meta: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, dict(zip(names, meta)), batch)
        return (out @ head).square().mean()

    def found(**options: Any) -> list[Tensor]:
        head, meta = draw(WIDTH, 3).requires_grad_(), list(net.parameters())
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, **options)
        total = inner(head, draw(3, 4, WIDTH), *meta).params.square().sum()
        return list(torch.autograd.grad(total, [head, *meta]))

    require_close(found(), found(**BLOCKS))
    # Without gradients, and with those of the first block, whose input is the batch, and the next.
    assert uncompiled.made == 3


def test_programs_keep_products_that_fit(
    uncompiled: Kept[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, 96), nn.Tanh(), nn.Linear(96, WIDTH), nn.Tanh())
    net = nn.Sequential(*(nn.Sequential(*deepcopy(layers)) for _ in range(2))).double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    expected, counts = gradients(net, loss, None, draw(5, WIDTH)), []
    for share, room in ((0, 0), (0.02, 0), (1, 0), (0, 1 << 20)):
        monkeypatch.setattr(compiled_block, "_codes", Kept())
        monkeypatch.setattr(block_code, "SHARE", share)
        monkeypatch.setattr(blocks, "ROOM", room)
        with CountProducts() as products_of_run:
            require_close(expected, gradients(net, loss, None, draw(5, WIDTH), **BLOCKS))
        counts.append(products_of_run.count)
    # In each of two blocks and steps, both products and their tangents, each of which takes two.
    assert counts[0] - counts[2] == counts[0] - counts[3] == 6 * 2 * 2
    # There is room for one: the tangent of the second, which takes the most time for its memory.
    assert counts[0] - counts[1] == 2 * 2 * 2


@pytest.mark.parametrize("graph", [False, True])
def test_a_gradient_in_the_loss_goes_through_programs(graph: bool, uncompiled: Kept[Any]) -> None:
    torch.manual_seed(0)
    net = of(Tied)().double()

    loss = penalized(net, graph)
    expected = gradients(net, loss, None, draw(3, 4, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(3, 4, WIDTH), **BLOCKS))
    assert uncompiled.made


class Scaled(nn.Module):
    """Holds a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(WIDTH, WIDTH), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.times * self.layer(x).tanh()


def test_a_number_that_the_loss_changes_belongs_to_the_program(uncompiled: Kept[Any]) -> None:
    torch.manual_seed(0)
    net: Any = of(Scaled)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for times in (1.0, 0.5):
            for block in net:
                block.times = times
            out: Tensor = torchopt.params.functional_call(net, p, batch)
            total = total + (out * scale).square().mean()
        return total

    expected = gradients(net, loss, None, draw(3, WIDTH))
    require_close(expected, gradients(net, loss, None, draw(3, WIDTH), **BLOCKS))
    assert uncompiled.made == 8  # first and second derivatives, of two blocks with two numbers


def test_blocks_are_searched_again_only_after_a_change(
    uncompiled: Kept[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    search = compiled_block.ReachedByBlock.search

    def counted(self: Any) -> Any:
        searches.append(1)
        return search(self)

    monkeypatch.setattr(compiled_block.ReachedByBlock, "search", counted)
    torch.manual_seed(0)
    net: Any = of(Scaled)().double()

    def loss(p: Any, batch: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return out.square().mean()

    batch = draw(3, WIDTH)

    def found(inner: Any) -> list[Tensor]:
        params = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
        total = sum(p.pow(3).sum() for p in inner(params, batch).params.values())
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, list(params.values())))

    def plain() -> list[Tensor]:
        return found(torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3))

    named = {"blocks": ["0", "1"], **BLOCKS}
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, **named)
    for expected_searches in (4, 0):  # two for each block, to notice changes in between
        searches.clear()
        require_close(plain(), found(inner))
        assert len(searches) == expected_searches
    made = uncompiled.made
    net[0].times = 0.5
    require_close(plain(), found(inner))
    assert len(searches) == 2
    assert uncompiled.made == made + 2
    weight = net[1].layer.weight  # the values of parameters are not searched
    net[1].layer.weight = nn.Parameter(weight.detach() * 1.1)
    require_close(plain(), found(inner))
    assert len(searches) == 2
    assert uncompiled.made == made + 2
    net[1].layer.bias = None
    require_close(plain(), found(inner))
    assert len(searches) == 4
    assert uncompiled.made == made + 4


def test_a_number_that_changes_before_a_derivative_with_a_graph_is_noticed(
    uncompiled: Kept[Any],
) -> None:
    torch.manual_seed(0)
    net: Any = of(Scaled)().double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        net[0].times = 1.0
        value = torchopt.params.functional_call(net, p, batch).square().mean()
        net[0].times = 0.5
        found = torch.autograd.grad(value, list(p.values()), create_graph=True)
        return value + sum(x.square().sum() for x in found)

    with pytest.raises(RuntimeError, match=r'\.times, which has another value now; .*"eager"'):
        gradients(net, loss, None, draw(3, WIDTH), **BLOCKS)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


class Branches(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Attends, "got a block that draws random numbers"),
        (Norms, "got a block that writes to buffers"),
        (Branches, "got one that depends on a value"),
    ],
)
def test_blocks_that_are_no_programs_are_refused(
    block: type[nn.Module], message: str, uncompiled: Kept[Any]
) -> None:
    torch.manual_seed(0)
    net = of(block)().double()
    before = {k: x.clone() for k, x in net.named_buffers()}

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    with pytest.raises(NotTraceableError, match=message):
        gradients(net, loss, None, draw(3, 4, WIDTH), **BLOCKS)
    assert not uncompiled.made
    assert all(torch.equal(x, before[k]) for k, x in net.named_buffers())


def test_calls_of_blocks_that_are_no_programs_are_refused(uncompiled: Kept[Any]) -> None:
    torch.manual_seed(0)
    net = of(Quiet)().double()
    shift = "0.shift"

    def batched(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        def one(x: Tensor) -> Tensor:
            out: Tensor = torchopt.params.functional_call(net, p, x)
            return out

        return (torch.func.vmap(one)(batch) * scale).square().mean()

    def shifted(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        given = {**p, shift: scale.expand(WIDTH)}
        out: Tensor = torchopt.params.functional_call(net, given, batch)
        return out.square().mean()

    with pytest.raises(NotTraceableError, match="outside of torch.func transforms, got a Quiet"):
        gradients(net, batched, None, draw(3, 4, WIDTH), **BLOCKS)
    with pytest.raises(NotTraceableError, match="a Quiet whose buffer 'shift' is differentiated"):
        gradients(net, shifted, None, draw(3, 4, WIDTH), **BLOCKS)


@pytest.mark.parametrize(
    "options", [{"derivative": "reverse"}, {"tasks": (None, 0)}, {"keep": "64MiB"}]
)
def test_options_that_compiled_blocks_have_not_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'execute: expected derivative="mixed", one task'):
        torchopt.inner_loop(lambda p: p, torchopt.sgd, steps=1, **{**BLOCKS, **options})


def test_compiled_blocks_need_blocks_and_a_compiler(
    codes: Kept[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).square().mean()

    def missing(graph: Any, examples: Any, told: Any) -> Any:
        raise CompilerError(told("no compiler"))

    net: nn.Module = nn.Linear(WIDTH, WIDTH).double()
    with pytest.raises(ValueError, match="expected a loss that calls equal blocks"):
        gradients(net, loss, None, draw(3, WIDTH), **BLOCKS)
    monkeypatch.setattr("torchopt.torch_internals.compiled_graph", missing)
    net = of(Scaled)().double()
    for _ in range(2):
        with pytest.raises(CompilerError, match='execute: no compiler, or use execute="eager"'):
            gradients(net, loss, None, draw(3, WIDTH), **BLOCKS)
