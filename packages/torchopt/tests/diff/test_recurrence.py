# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers, cells and packed sequences in a vmap, against torch's own without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpad_sequence,
)
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt.diff.twice_differentiable import twice_differentiable
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import without_recurrent_kernels
from torchopt.tree import tree_leaves, tree_map

TIME, BATCH, INPUTS, SIZE, TASKS = 3, 3, 2, 3, 2


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN of tanh": nn.RNN,
    "RNN of relu": lambda *sizes, **given: nn.RNN(*sizes, nonlinearity="relu", **given),
    "LSTM with a projection": lambda *sizes, **given: nn.LSTM(*sizes, proj_size=2, **given),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without bias": {"bias": False},
    "two layers": {"num_layers": 2, "dropout": 0.5},  # of a module that is not trained
    "both directions": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}
CELLS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "RNN of tanh": nn.RNNCell,
    "RNN of relu": lambda *sizes, **given: nn.RNNCell(*sizes, nonlinearity="relu", **given),
}


def derivatives(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Return the values of a function, and the gradients of two functions of them."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    values = tree_leaves(function(tensors))
    out = values
    for _ in range(2):
        scalar = sum(((x + 0.3) ** 3).sum() for x in out)
        out = list(torch.autograd.grad(scalar, tensors, create_graph=True))  # type: ignore[arg-type]
        values = [*values, *out]
    return values


def require_as_in_a_loop(function: Any, shared: list[Tensor], own: list[Tensor]) -> None:
    """Compare the vmap of a function of two lists with its values for one task after the other."""

    def in_a_loop(tensors: list[Tensor]) -> Any:
        first, rest = tensors[: len(shared)], tensors[len(shared) :]
        found = [tree_leaves(function(first, [x[i] for x in rest])) for i in range(TASKS)]
        return [torch.stack(x) for x in zip(*found)]

    def in_a_vmap(tensors: list[Tensor]) -> Any:
        first, rest = tensors[: len(shared)], tensors[len(shared) :]
        changed = twice_differentiable(lambda *x: tree_leaves(function(first, list(x))))
        return torch.func.vmap(changed)(*rest)

    with without_recurrent_kernels():  # they have no second derivative
        expected = derivatives(in_a_loop, [*shared, *own])
    got = derivatives(in_a_vmap, [*shared, *own])
    assert all(x.norm() > 0 for x in expected)
    for x, y in zip(expected, got, strict=True):
        assert (x - y).abs().max() <= 1e-12 * (1 + x.abs().max())


def parts(module: nn.Module) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return a function of a list of parameters and of arguments, and the parameters."""
    names = [name for name, _ in module.named_parameters()]

    def call(weights: list[Tensor], *args: Any) -> Any:
        return functional_call(module, dict(zip(names, weights)), args)

    return call, [p.detach() for p in module.parameters()]


def start_of(module: Any, *batch: int) -> list[Tensor]:
    """Return an initial state for each task."""
    count = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or SIZE, *([SIZE] if isinstance(module, nn.LSTM) else [])]
    return [draw(TASKS, count, *batch, size, seed=7 + i) for i, size in enumerate(sizes)]


def stated(state: list[Tensor]) -> Any:
    return tuple(state) if len(state) == 2 else state[0]


@pytest.mark.parametrize(
    ("option", "weights"), [*((option, "own") for option in OPTIONS), ("plain", "shared")]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_in_a_vmap_is_that_of_torch(kind: str, option: str, weights: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[kind](INPUTS, SIZE, **OPTIONS[option]).double().eval()
    call, params = parts(module)
    shape = (BATCH, TIME) if OPTIONS[option].get("batch_first") else (TIME, BATCH)
    x = draw(TASKS, *shape, INPUTS, seed=1)
    if weights == "shared":
        require_as_in_a_loop(lambda first, rest: call(first, *rest), params, [x])
        return
    own = [p + 0.1 * draw(TASKS, *p.shape, seed=i) for i, p in enumerate(params)]
    state, count = start_of(module, BATCH), len(own)
    require_as_in_a_loop(
        lambda _, rest: call(rest[:count], rest[count], stated(rest[count + 1 :])),
        [],
        [*own, x, *state],
    )


@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "without bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_in_a_vmap_is_that_of_torch(kind: str, bias: bool, given: bool) -> None:
    torch.manual_seed(0)
    call, params = parts(CELLS[kind](INPUTS, SIZE, bias=bias).double())
    count = (1 + (kind == "LSTM")) * given
    state = [draw(TASKS, BATCH, SIZE, seed=i) for i in range(count)]

    def function(first: list[Tensor], rest: list[Tensor]) -> Any:
        found = call(first, rest[0], *([stated(rest[1:])] if given else []))
        again = call(first, rest[0], found)
        return found, again  # so that the weights of the state have a gradient

    require_as_in_a_loop(function, params, [draw(TASKS, BATCH, INPUTS, seed=5), *state])


@pytest.mark.parametrize(
    ("option", "lengths"), [*((option, (3, 2, 1)) for option in OPTIONS), ("plain", (2, 2, 2))]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_sequence_in_a_vmap_is_that_of_torch(
    kind: str, option: str, lengths: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module: Any = LAYERS[kind](INPUTS, SIZE, **OPTIONS[option]).double().eval()
    call, params = parts(module)
    first = module.batch_first
    shape = (BATCH, TIME) if first else (TIME, BATCH)

    def function(weights: list[Tensor], rest: list[Tensor]) -> Any:
        packed = pack_padded_sequence(rest[0], list(lengths), batch_first=first)
        found, state = call(weights, packed, stated(rest[1:]))
        padded, count = pad_packed_sequence(found, batch_first=first, padding_value=0.5)
        assert count.tolist() == list(lengths)
        return padded, state

    state = start_of(module, BATCH)
    require_as_in_a_loop(function, params, [draw(TASKS, *shape, INPUTS, seed=1), *state])


def test_sequences_of_any_order_are_packed_padded_and_unpadded() -> None:
    torch.manual_seed(0)
    module = nn.GRU(INPUTS, SIZE, bidirectional=True).double()
    call, params = parts(module)
    lengths = torch.tensor([2, 3, 1])

    def function(weights: list[Tensor], rest: list[Tensor]) -> Any:
        x = rest[0]
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        padded, count = pad_packed_sequence(call(weights, packed)[0], total_length=6)
        parts = unpad_sequence(padded, count)
        left = pad_sequence(parts, padding_value=2.0, padding_side="left")
        again = call(weights, pack_sequence([x[:, 0], x[:2, 1]]))[0]
        assert isinstance(again, PackedSequence)
        return padded, parts, left, pad_sequence(parts, batch_first=True), again.data

    require_as_in_a_loop(function, params, [draw(TASKS, TIME, BATCH, INPUTS, seed=1)])


@pytest.mark.parametrize("where", ["pack", "pad", "layer"])
def test_lengths_of_each_task_raise(where: str) -> None:
    layer = nn.GRU(INPUTS, SIZE).double()
    x = draw(TASKS, TIME, BATCH, INPUTS, seed=1)
    lengths = torch.tensor([[3, 2, 1], [3, 3, 2]])

    def function(x: Tensor, lengths: Tensor) -> Any:
        if where == "pack":
            return pack_padded_sequence(x, lengths).data
        data = x.flatten(0, 1)
        if where == "pad":
            return pad_packed_sequence(PackedSequence(data, lengths))[0]
        weights, start = list(layer.parameters()), torch.zeros(1, BATCH, SIZE, dtype=x.dtype)
        return torch.gru(data, lengths, start, weights, True, 1, 0.0, False, False)[0]

    with pytest.raises(NotDifferentiableError, match=r"lengths that all tasks share.* by a mask"):
        torch.func.vmap(twice_differentiable(function))(x, lengths)


def test_dropout_is_between_layers_and_only_in_training() -> None:
    torch.manual_seed(0)
    x = draw(64, TIME, 8, INPUTS, seed=1)
    module = nn.RNN(INPUTS, 16, num_layers=2, dropout=0.25, nonlinearity="relu").double()
    with torch.no_grad():  # the first layer gives ones, the second one passes them on
        for p in module.parameters():
            p.zero_()
        module.bias_ih_l0.fill_(1.0)
        module.weight_ih_l1.copy_(torch.eye(16))
    run = torch.func.vmap(twice_differentiable(lambda x: module(x)[0]), randomness="different")
    found = run(x)
    assert found.unique().tolist() == [0.0, 1 / 0.75]
    # A binomial frequency; five standard deviations.
    share = (found == 0).double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / found.numel()) ** 0.5
    assert (found[0] != found[1]).any()
    assert (found[:, 0] != found[:, 1]).any()
    assert (module.eval() and run(x) == 1).all()
    packed = torch.func.vmap(
        twice_differentiable(lambda x: module(pack_padded_sequence(x, [3] * 8))[0].data),
        randomness="different",
    )
    module.train()
    assert packed(x).unique().tolist() == [0.0, 1 / 0.75]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(INPUTS, SIZE)

    def forward(self, x: Tensor) -> Any:
        return pad_packed_sequence(self.layer(pack_padded_sequence(x, [3, 2, 1]))[0])


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(INPUTS, SIZE)

    def forward(self, x: Tensor) -> Any:
        state = None
        for now in x:
            state = self.cell(now, state)
        return state


MODULES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(INPUTS, SIZE, num_layers=2, bidirectional=True),
    "GRU": lambda: nn.GRU(INPUTS, SIZE),
    "RNN": lambda: nn.RNN(INPUTS, SIZE),
    "LSTMCell": Stepped,
    "packed GRU": Packed,
}
MODES: list[dict[str, Any]] = [
    {"derivative": "reverse"},
    {"derivative": "reverse", "keep": 1},
    {"derivative": "mixed"},
    {"derivative": "first_order"},
    {"derivative": "forward"},
    {"derivative": "reverse", "execute": "trace"},
    {"derivative": "mixed", "keep": "steps", "execute": "trace"},
]
# To trace takes seconds, and lengths that decide shapes are not traced.
TRACED = [("tasks", "RNN", "reverse"), ("tasks", "LSTMCell", "mixed")]


@pytest.mark.parametrize(
    ("kind", "mode", "how"),
    [
        pytest.param(kind, mode, how, id="-".join((kind, *map(str, mode.values()), how)))
        for kind in MODULES
        for mode in MODES
        for how in ("tasks", "vmap")
        if "execute" not in mode or (how, kind, mode["derivative"]) in TRACED
    ],
)
def test_tasks_with_a_recurrent_layer_are_as_in_a_loop(
    kind: str, mode: dict[str, Any], how: str
) -> None:
    torch.manual_seed(0)
    module = MODULES[kind]().double()
    forward = mode["derivative"] == "forward"
    start = {k: p.detach().requires_grad_(not forward) for k, p in module.named_parameters()}
    x, lr = draw(TASKS, TIME, BATCH, INPUTS, seed=1), torch.tensor(0.1, requires_grad=True)
    lr = lr.detach().double().requires_grad_()

    def loss(params: Any, batch: Tensor) -> Tensor:
        out = torchopt.params.functional_call(module, params, batch)
        value: Tensor = (out[0] ** 2 + out[0]).mean()
        return value

    def gradients(params: list[Any]) -> list[Tensor]:
        total = sum((p**3).sum() for tree in params for p in tree_leaves(tree))
        wanted = [lr] if forward else [lr, *start.values()]
        return list(torch.autograd.grad(total, wanted))  # type: ignore[arg-type]

    given = {"steps": 2, **mode}
    one = torchopt.inner_loop(loss, torchopt.adam, **given)
    expected = gradients([one(start, x[i], lr=lr, eps=1e-2).params for i in range(TASKS)])
    if how == "tasks":
        many = torchopt.inner_loop(loss, torchopt.adam, tasks=(None, 0), **given)
        got = gradients([many(start, x, lr=lr, eps=1e-2).params])
    else:
        run = torch.func.vmap(lambda x: one(start, x, lr=lr, eps=1e-2).params)
        got = gradients([run(x)])
    for a, b in zip(expected, got, strict=True):
        assert a.norm() > 1e-6
        assert (a - b).abs().max() <= 1e-12 * (1 + a.abs().max())


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_are_differentiated_by_transforms_and_in_forward_mode(kind: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[kind](INPUTS, SIZE, bidirectional=True).double()

    @twice_differentiable
    def function(x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [3, 1])
        total: Tensor = (pad_packed_sequence(module(packed)[0])[0] ** 3).sum()
        return total

    x, v = draw(3, 2, INPUTS, seed=1).requires_grad_(), draw(3, 2, INPUTS, seed=2)
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    products = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in gradient.flatten()]
    hessian = torch.stack(products).reshape(*x.shape, *x.shape)
    assert hessian.norm() > 1e-3
    at = x.detach()
    got = [
        (torch.func.grad(function)(at), gradient),
        (torch.func.jvp(function, (at,), (v,))[1], (gradient * v).sum()),
        (torch.func.hessian(function)(at), hessian),
        (torch.func.jacrev(torch.func.grad(function))(at), hessian),
    ]
    for a, b in got:
        assert (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())


@pytest.mark.parametrize("tasks", [None, (None, 0)], ids=["one", "tasks"])
@pytest.mark.parametrize("derivative", ["mixed", "forward"])
def test_packed_sequences_of_parameters_in_forward_mode(derivative: str, tasks: Any) -> None:
    torch.manual_seed(0)
    module = Packed().double()
    start = {k: p.detach() for k, p in module.named_parameters()}
    start["before"] = draw(INPUTS, INPUTS, seed=3)
    x = draw(TASKS, TIME, BATCH, INPUTS, seed=1)

    def loss(params: Any, batch: Tensor) -> Tensor:
        rest = {k: p for k, p in params.items() if k != "before"}
        out = torchopt.params.functional_call(module, rest, batch @ params["before"])
        value: Tensor = (out[0] ** 2 + out[0]).mean()
        return value

    found = []
    for how in ("reverse", derivative):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        inner = torchopt.inner_loop(loss, torchopt.sgd, steps=3, derivative=how, tasks=tasks)
        params = inner(start, x[0] if tasks is None else x, lr=lr).params
        total = sum((p**3).sum() for p in params.values())
        found.append(torch.autograd.grad(total, lr)[0])
    assert found[0].abs() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_first_order_tasks_may_have_a_checkpoint_with_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    module = nn.GRU(INPUTS, SIZE).double()
    start = {k: p.detach().requires_grad_() for k, p in module.named_parameters()}
    x = draw(TASKS, TIME, BATCH, INPUTS, seed=1)

    def loss(params: Any, batch: Tensor) -> Tensor:
        def run(y: Tensor) -> Tensor:
            found: Tensor = torchopt.params.functional_call(module, params, y)[0]
            return found

        value: Tensor = checkpoint(run, batch, use_reentrant=False).square().mean()
        return value

    found = []
    for tasks in (None, (None, 0)):
        inner = torchopt.inner_loop(
            loss, torchopt.sgd(0.5), steps=2, derivative="first_order", tasks=tasks
        )
        calls = [inner(start, y) for y in x] if tasks is None else [inner(start, x)]
        total = sum((p**3).sum() for call in calls for p in call.params.values())
        found.append(torch.autograd.grad(total, list(start.values())))
    for a, b in zip(*found, strict=True):
        assert a.norm() > 1e-6
        assert (a - b).abs().max() <= 1e-12 * (1 + a.abs().max())


def test_a_constant_state_is_shared_by_tasks() -> None:
    layer = nn.LSTM(INPUTS, SIZE).double()
    state = tree_map(lambda x: x[0], tuple(start_of(layer, BATCH)))
    x = draw(TASKS, TIME, BATCH, INPUTS, seed=1)
    expected = torch.stack([layer(y, state)[0] for y in x])
    got = torch.func.vmap(twice_differentiable(lambda y: layer(y, state)[0]))(x)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_operations_take_their_arguments_by_name() -> None:
    layer = nn.GRU(INPUTS, SIZE).double()
    (state,) = start_of(layer, BATCH)
    x = draw(TASKS, TIME, BATCH, INPUTS, seed=1)
    named = {
        "hx": state[0],
        "params": list(layer.parameters()),
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
    }
    packed = pack_padded_sequence(x[0], [3, 2, 1])

    def function(x: Tensor, data: Tensor) -> Any:
        plain = torch.gru(input=x, batch_first=False, **named)  # type: ignore[call-overload]
        return plain, torch.gru(data=data, batch_sizes=packed.batch_sizes, **named)  # type: ignore[call-overload]

    data = torch.stack([packed.data, 2 * packed.data])
    got = tree_leaves(torch.func.vmap(twice_differentiable(function))(x, data))
    for i in range(TASKS):
        for a, b in zip(got, tree_leaves(function(x[i], data[i])), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-13, atol=1e-14)
