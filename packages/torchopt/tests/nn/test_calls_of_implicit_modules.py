# SPDX-License-Identifier: Apache-2.0
"""Arguments of `solve`, frozen parameters, copies, and several solves before one backward pass."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import typing
import weakref

import pytest
import torch

from torchopt.errors import NotDifferentiableError
from torchopt.nn import ImplicitMetaGradientModule

D = torch.float64


def leaf(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=D, requires_grad=True)


class Shrunk(ImplicitMetaGradientModule):
    """min |w - mu|^2 + lam |w|^2, w = mu / (1 + lam); lam is the sum of `solve`'s arguments."""

    def __init__(self, mu):
        super().__init__()
        self.mu = mu
        self.w = torch.nn.Parameter(torch.zeros(3, dtype=D))

    @staticmethod
    def total(tree):
        return sum(x.sum() for x in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(x))

    def objective(self, *args, **kwargs):
        lam = self.total((args, kwargs))
        return ((self.w - self.mu) ** 2).sum() + lam * (self.w**2).sum()

    def solve(self, *args, **kwargs):
        with torch.no_grad():
            self.w.copy_((self.mu / (1 + self.total((args, kwargs)))).expand(3))
        return self


class ShrunkRoot(Shrunk):
    def optimality(self, *args, **kwargs):
        return (self.w - self.mu + self.total((args, kwargs)) * self.w,)


ARGUMENTS = {
    "positional": lambda lam: ((lam,), {}),
    "keyword": lambda lam: ((), {"lam": lam}),
    "a list in a dict": lambda lam: (({"a": [lam, "text", 3]},), {}),
    "keywords in a tuple": lambda lam: ((), {"lam": (None, {"x": lam})}),
    "beside constants": lambda lam: (
        (torch.tensor(0, dtype=torch.int64), torch.zeros(2, dtype=D), lam),
        {},
    ),
    "computed": lambda lam: ((lam * 0.5,), {"more": lam * 0.5}),
}


@pytest.mark.parametrize("where", sorted(ARGUMENTS))
@pytest.mark.parametrize("cls", [Shrunk, ShrunkRoot])
def test_arguments_of_solve_get_their_gradient(cls, where):
    mu, lam = leaf(1.0), leaf(1.0)
    args, kwargs = ARGUMENTS[where](lam)
    w = cls(mu).solve(*args, **kwargs).w.sum()
    first = torch.autograd.grad(w, (mu, lam), create_graph=True)
    torch.testing.assert_close(first, (leaf(1.5), leaf(-0.75)))
    second = torch.autograd.grad(first[1], (mu, lam))
    torch.testing.assert_close(second, (leaf(-0.75).detach(), leaf(0.75).detach()))


def test_an_argument_is_enough_without_meta_parameters():
    lam = leaf(1.0)
    module = Shrunk(torch.ones((), dtype=D))
    module.solve(lam).w.sum().backward()
    torch.testing.assert_close(lam.grad, leaf(-0.75).detach())


def test_a_tensor_in_a_list_of_the_module_is_refused_by_name():
    class Listed(Shrunk):
        def objective(self):
            return super().objective(*self.lams)

        def solve(self):
            return super().solve(*self.lams)

    module = Listed(leaf(1.0))
    module.lams = [leaf(0.5), leaf(0.5)]
    with pytest.raises(NotDifferentiableError, match=r"lams\[0\].*lams\[1\].*constructor"):
        module.solve()


class Head(ImplicitMetaGradientModule, on_fail="raise"):
    """min 1/2 (v w - c)^2 + 1/2 w^2 in w alone, v frozen: w = v c / (v^2 + 1)."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.back, self.head = (torch.nn.Linear(1, 1, bias=False, dtype=D) for _ in range(2))
        with torch.no_grad():
            self.back.weight.fill_(2.0)
        self.back.requires_grad_(False)

    def objective(self):
        v, w = self.back.weight, self.head.weight
        return 0.5 * ((v * w - self.c) ** 2).sum() + 0.5 * (w**2).sum() + 0.5 * ((v - 1) ** 2).sum()

    def solve(self):
        v = self.back.weight
        with torch.no_grad():
            self.head.weight.copy_(v * self.c / (v * v + 1))
        return self


class HeadRoot(Head):
    def optimality(self):
        v, w = self.back.weight, self.head.weight
        return (v * w - self.c) * v + w


class HeadRootOfAll(Head):
    """Its optimality has an entry for each of `self.parameters()`, including the frozen one."""

    def optimality(self):
        v, w = self.back.weight, self.head.weight
        return (v - 1 + w * (v * w - self.c)), (v * w - self.c) * v + w


@pytest.mark.parametrize("cls", [Head, HeadRoot, HeadRootOfAll])
def test_a_frozen_parameter_is_a_constant_and_stays_frozen(cls):
    c = leaf(1.5)
    module = cls(c)
    frozen = module.back.weight
    for _ in range(2):
        module.solve()
        assert module.back.weight is frozen
        assert not frozen.requires_grad
        (got,) = torch.autograd.grad(module.head.weight.sum(), c, retain_graph=True)
        torch.testing.assert_close(got, torch.tensor(0.4, dtype=D))


def test_a_module_of_frozen_parameters_has_nothing_to_solve_for():
    module = Shrunk(leaf(1.0))
    module.w.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameters.*requires a gradient"):
        module.solve()


@pytest.mark.parametrize("cls", [Shrunk, ShrunkRoot])
def test_several_solves_and_one_backward_pass(cls):
    mu = leaf(1.0)
    module, total = cls(mu), 0.0
    lams = [leaf(float(k)) for k in range(1, 4)]
    for lam in lams:
        total = total + module.solve(lam).w.sum()
    got = torch.autograd.grad(total, (mu, *lams))
    expected = [sum(3 / (1 + k) for k in range(1, 4)), *(-3 / (1 + k) ** 2 for k in range(1, 4))]
    torch.testing.assert_close(torch.stack(got), torch.tensor(expected, dtype=D))


class Normalised(ImplicitMetaGradientModule):
    """Ridge regression on batch-normalised inputs."""

    def __init__(self, lam):
        super().__init__()
        self.lam = lam
        self.norm = torch.nn.BatchNorm1d(2, affine=False, dtype=D)
        self.w = torch.nn.Parameter(torch.zeros(2, dtype=D))

    def objective(self, x, y):
        return ((self.norm(x) @ self.w - y) ** 2).mean() + self.lam * (self.w**2).sum()

    def solve(self, x, y):
        with torch.no_grad():
            self.w.copy_(ridge(x, y, self.lam))
        return self


def ridge(x, y, lam):
    z = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    return torch.linalg.solve(z.T @ z / len(z) + lam * torch.eye(2, dtype=D), z.T @ y / len(z))


def test_batch_normalisation_is_that_of_the_call_and_its_statistics_stay():
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(20, 2, dtype=D, generator=generator) + 3
    y = torch.randn(20, dtype=D, generator=generator)
    lam = leaf(0.3)
    module = Normalised(lam).solve(x, y)
    before = {k: b.clone() for k, b in module.named_buffers()}
    loss = module.w.sum()
    module.eval()
    loss.backward()
    expected = torch.autograd.grad(ridge(x, y, lam).sum(), lam)[0]
    torch.testing.assert_close(lam.grad, expected)
    for k, b in module.named_buffers():
        assert torch.equal(b, before[k])
    assert not module.norm.training


def test_a_solve_that_raises_does_not_change_the_module():
    class Fails(Shrunk):
        fail = False

        def solve(self, lam):
            super().solve(lam)
            if self.fail:
                raise ZeroDivisionError
            return self

    mu = leaf(1.0)
    module = Fails(mu)
    module.solve(leaf(1.0))
    before = module.w
    module.fail = True
    with pytest.raises(ZeroDivisionError):
        module.solve(leaf(3.0))
    assert module.w is before
    torch.testing.assert_close(torch.autograd.grad(module.w.sum(), mu)[0], leaf(1.5).detach())
    module.fail = False
    torch.testing.assert_close(module.solve(leaf(3.0)).w.sum(), leaf(0.75).detach())


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "deepcopy of a container": lambda m: copy.deepcopy(torch.nn.ModuleList([m]))[0],
}


@pytest.mark.parametrize("by", sorted(COPIES))
@pytest.mark.parametrize("solved", [False, True])
def test_a_copy_is_an_independent_module(by, solved):
    mu, lam = leaf(1.0), leaf(1.0)
    module = Shrunk(mu)
    if solved:
        module.solve(lam)
    copied = COPIES[by](module)
    assert copied.mu is not mu
    assert torch.equal(copied.w, module.w)
    copied.again = copied.mu  # still known as meta
    assert [k for k, _ in copied.named_parameters()] == ["w"]
    assert dict(copied.named_meta_parameters()).keys() == {"mu"}
    got = torch.autograd.grad(copied.solve(lam).w.sum(), (copied.mu, lam))
    torch.testing.assert_close(got, (leaf(1.5).detach(), leaf(-0.75).detach()))
    if solved:  # the original has not changed
        torch.testing.assert_close(torch.autograd.grad(module.w.sum(), mu)[0], got[0])


class Twice(Shrunk):
    """Two parameters, whose solutions share a node of the graph."""

    def __init__(self, mu):
        super().__init__(mu)
        self.v = torch.nn.Parameter(torch.zeros(3, dtype=D))

    def objective(self, lam):
        return super().objective(lam) + ((self.v - self.mu) ** 2).sum()

    def solve(self, lam):
        with torch.no_grad():
            self.v.copy_(self.mu.expand(3))
        return super().solve(lam)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("cls", [Shrunk, Twice])
def test_solved_modules_are_released(cls, backward):
    refs = []
    for _ in range(3):
        module = cls(leaf(1.0))
        for _ in range(2):
            w = module.solve(leaf(1.0)).w.sum()
            if backward:
                w.backward()
        del w
        refs.append(weakref.ref(module))
        del module
    gc.collect()
    assert not any(ref() for ref in refs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [False, True])
def test_a_solve_without_derivatives_leaves_the_parameters_trainable(mode, first):
    mu, lam = leaf(1.0), leaf(1.0)
    module = Shrunk(mu)
    if first:
        module.solve(lam)
    with mode():
        assert module.solve(leaf(3.0)) is module
    assert module.w.is_leaf
    assert module.w.requires_grad
    assert [k for k, _ in module.named_parameters()] == ["w"]
    torch.testing.assert_close(module.w.detach(), torch.full((3,), 0.25, dtype=D))
    got = torch.autograd.grad(module.solve(lam).w.sum(), (mu, lam))
    torch.testing.assert_close(got, (leaf(1.5).detach(), leaf(-0.75).detach()))


def test_a_solve_with_frozen_meta_parameters_leaves_the_parameters_trainable():
    mu, lam = leaf(1.0), torch.tensor(1.0, dtype=D)
    module = Shrunk(mu)
    mu.requires_grad_(False)
    module.solve(lam)
    assert module.w.requires_grad
    mu.requires_grad_(True)
    got = torch.autograd.grad(module.solve(lam).w.sum(), mu)
    torch.testing.assert_close(got, (leaf(1.5).detach(),))


def test_parameters_that_solve_returns_are_those_of_the_solution():
    class Returns(Shrunk):
        def solve(self, lam):
            super().solve(lam)
            return {"w": self.w, "loss": self.w.sum(), "count": 3, "none": None}

    mu, lam = leaf(1.0), leaf(1.0)
    module = Returns(mu)
    for _ in range(2):
        found = module.solve(lam)
        assert found["w"] is module.w
        assert (found["count"], found["none"]) == (3, None)
        assert not found["loss"].requires_grad
        got = torch.autograd.grad(found["w"].sum(), (mu, lam))
        torch.testing.assert_close(got, (leaf(1.5).detach(), leaf(-0.75).detach()))


def test_a_buffer_that_is_computed_stays_a_buffer():
    class Averaged(Shrunk):
        def __init__(self, mu):
            super().__init__(mu)
            self.register_buffer("mean", torch.zeros((), dtype=D))

        def objective(self, lam):
            self.mean = 0.5 * self.mean + 0.5 * self.w.mean()
            return super().objective(lam)

        def solve(self, lam):
            with torch.enable_grad():
                self.objective(lam)
            return super().solve(lam)

    mu, lam = leaf(1.0), leaf(1.0)
    module = Averaged(mu)
    got = torch.autograd.grad(module.solve(lam).w.sum(), (mu, lam))
    assert [k for k, _ in module.named_parameters()] == ["w"]
    assert [k for k, _ in module.named_buffers()] == ["mean"]
    torch.testing.assert_close(got, (leaf(1.5).detach(), leaf(-0.75).detach()))


@pytest.mark.parametrize("value", [torch.zeros(3, dtype=D), 3.0])
def test_a_parameter_is_not_replaced_by_a_constant(value):
    class Assigns(Shrunk):
        def solve(self, lam):
            with torch.no_grad():
                self.w = value
            return self

    mu, lam = leaf(1.0), leaf(1.0)
    module = Assigns(mu)
    with pytest.raises(TypeError, match=r"as parameter 'w': expected .* self.w.copy_\(value\)"):
        module.solve(lam)
    assert [k for k, _ in module.named_parameters()] == ["w"]
    assert module.w.requires_grad


class Normalized(ImplicitMetaGradientModule):
    """w = mean(net(x)) / 2 of a meta-module with batch statistics."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.w = torch.nn.Parameter(torch.zeros((), dtype=D))

    def objective(self, x):
        return (self.w - (self.net(x) ** 3).mean()) ** 2 + self.w**2

    def solve(self, x):
        with torch.no_grad():
            self.w.copy_((copy.deepcopy(self.net)(x) ** 3).mean() / 2)
        return self


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_a_meta_module(training):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([0.5, -1.0]))
    x = torch.randn(6, 3, dtype=D)
    own = copy.deepcopy(net).train(training)
    expected = torch.autograd.grad((own(x) ** 3).mean() / 2, list(own.parameters()))
    module = Normalized(net)
    net.train(training)
    module.solve(x)
    before = copy.deepcopy(dict(net.named_buffers()))
    net.train(not training)  # as for the evaluation of the outer loss
    got = torch.autograd.grad(module.w, list(net.parameters()))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)
    assert net.training is not training


class TwoNames(ImplicitMetaGradientModule):
    """min |w - a|^2 + 2 |w - b|^2 + |f(w) - w|^2, f a linear map with one matrix used twice."""

    def __init__(self, a, b, net):
        super().__init__()
        self.a, self.b, self.net = a, b, net
        self.w = torch.nn.Parameter(torch.zeros(2, dtype=D))

    def objective(self):
        rest = ((self.w - self.a) ** 2).sum() + 2 * ((self.w - self.b) ** 2).sum()
        return rest + ((self.net(self.w) - self.w) ** 2).sum()

    def solve(self):
        with torch.no_grad():
            self.w.copy_(two_names(self.a, self.b, self.net[0].weight, self.net[1].weight))


def two_names(a, b, first, second):
    eye = torch.eye(2, dtype=D)
    rest = second @ first - eye
    return torch.linalg.solve(3 * eye + rest.mT @ rest, a + 2 * b)


@pytest.mark.parametrize("shared", ["weights", "a sub-module"])
def test_meta_parameters_may_have_several_names(shared):
    a = leaf(1.0, -2.0)
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False, dtype=D) for _ in range(2)))
    if shared == "weights":
        net[1].weight = net[0].weight
    else:
        net[1] = net[0]
    module = TwoNames(a, a, net)
    module.solve()
    found = torch.autograd.grad((module.w**3).sum(), [a, net[0].weight])
    weight = net[0].weight
    expected = torch.autograd.grad((two_names(a, a, weight, weight) ** 3).sum(), [a, weight])
    torch.testing.assert_close(found, expected)


class Keeping(Shrunk):
    """Keeps what it computes, under a new name."""

    def objective(self, *args, **kwargs):
        self.apart = self.w - self.mu
        return (self.apart**2).sum() + self.total((args, kwargs)) * (self.w**2).sum()


def test_activations_that_are_kept_are_no_parameters():
    mu, lam = leaf(1.0, -2.0, 3.0), leaf(0.5)
    module = Keeping(mu)
    for _ in range(3):
        module.solve(lam)
        found = torch.autograd.grad(module.w.sum(), [mu, lam])
        torch.testing.assert_close(found[0], torch.ones_like(mu) / 1.5)
        torch.testing.assert_close(found[1], -mu.sum().detach() / 1.5**2)
        assert [name for name, _ in module.named_parameters()] == ["w"]
        with torch.enable_grad():
            assert module.objective(lam.detach()).requires_grad


@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, copy.copy])
def test_an_objective_that_is_called_before_solve_adds_no_parameter(copied):
    mu, lam = leaf(1.0, -2.0, 3.0), leaf(0.5)
    module = copied(Keeping(mu))
    module.objective(lam.detach())
    assert [name for name, _ in module.named_parameters()] == ["w"]
    module.solve(lam)
    (found,) = torch.autograd.grad(module.w.sum(), lam)
    torch.testing.assert_close(found, -mu.sum().detach() / 1.5**2)


def test_a_constructor_may_compute_a_parameter():
    class Started(Shrunk):
        def __init__(self, mu):
            super().__init__(mu)
            self.start = mu.clone()

    assert [name for name, _ in Started(leaf(1.0, 2.0, 3.0)).named_parameters()] == ["w", "start"]


class Solvable(typing.Protocol):
    def solve(self, lam): ...


class Mixin:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mixed = self.mu.clone()


class Longer(Keeping):
    def __init__(self, mu):
        """Documented."""
        super().__init__(mu)
        self.start = mu.clone()


def decorated(cls):
    written = cls.__init__

    @functools.wraps(written)
    def init(self, *args):
        written(self, *args)
        self.decorated = self.mu.clone()

    cls.__init__ = init
    return cls


MADE = {
    "a protocol": (type("ThenProtocol", (Keeping, Solvable), {}), ["w"]),
    "a protocol first": (type("Protocol", (Solvable, Keeping), {}), ["w"]),
    "a mixin": (type("Mixed", (Mixin, Keeping), {}), ["w", "mixed"]),
    "a constructor of its own": (Longer, ["w", "start"]),
    "an inherited constructor": (type("Inherited", (Longer,), {}), ["w", "start"]),
    "a decorator": (decorated(type("Decorated", (Longer,), {})), ["w", "start", "decorated"]),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", MADE)
def test_what_a_constructor_computes_is_a_parameter_and_what_is_kept_later_is_none(kind, again):
    cls, names = MADE[kind]
    mu, lam = leaf(1.0, -2.0, 3.0), leaf(0.5)
    for parent in (Keeping, Longer) if again else ():
        parent(mu)
    module = cls(mu)
    for made in (copy.copy(module), copy.deepcopy(module), module):
        made.objective(lam.detach())
        assert [name for name, _ in made.named_parameters()] == names


def test_a_constructor_that_raised_may_be_called_again():
    class Late(Shrunk):
        def __init__(self, mu, raises):
            super().__init__(mu)
            if raises:
                raise ValueError("late")
            self.start = mu.clone()

    mu = leaf(1.0, 2.0, 3.0)
    module = Late.__new__(Late, mu, True)
    with pytest.raises(ValueError, match="late"):
        module.__init__(mu, True)
    module.__init__(mu, False)
    assert [name for name, _ in module.named_parameters()] == ["w", "start"]


def test_constructors_keep_their_signatures_and_documentation():
    Longer(leaf(1.0, 2.0, 3.0))
    assert list(inspect.signature(Longer).parameters) == ["mu"]
    assert Longer.__init__.__doc__ == "Documented."
    assert Longer.__init__.__qualname__ == "Longer.__init__"
    assert type(Longer) is type(ImplicitMetaGradientModule)
