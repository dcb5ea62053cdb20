# SPDX-License-Identifier: Apache-2.0
"""ImplicitMetaGradientModule against closed forms and the published tutorial."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchopt
from torchopt.diff.implicit import OptimalityError, OptimalityWarning
from torchopt.linear_solve import solve_cg, solve_normal_cg
from torchopt.nn import ImplicitMetaGradientModule, MetaGradientModule, reparametrize, swap_state


class Proximal(ImplicitMetaGradientModule, linear_solve=solve_cg()):
    """min |w - target|^2 + lam / 2 |w - center|^2: w = (2 target + lam center) / (2 + lam)."""

    def __init__(self, center, lam=0.5, optimizer="closed"):
        super().__init__()
        self.center = center
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.lam = lam
        self.optimizer = optimizer
        self.register_buffer("calls", torch.zeros(()))

    def objective(self, target, *, scale=1.0):
        self.calls += 1
        fit = ((self.w - target) ** 2).sum() * scale
        return fit + self.lam / 2 * ((self.w - self.center) ** 2).sum()

    def solve(self, target, *, scale=1.0):
        if self.optimizer == "closed":
            with torch.no_grad():
                value = (2 * scale * target + self.lam * self.center) / (2 * scale + self.lam)
                self.w.copy_(value)
            return self
        with torch.enable_grad():
            if self.optimizer == "torch":
                optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
                for _ in range(80):
                    optimizer.zero_grad()
                    self.objective(target).backward()
                    optimizer.step()
            else:
                optimizer = torchopt.MetaSGD(self, lr=0.2)
                for _ in range(80):
                    optimizer.step(self.objective(target))
        return self


TARGET = torch.tensor([4.0, -1.0], dtype=torch.float64)


def center():
    return torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("optimizer", ["closed", "torch", "torchopt"])
def test_gradient_of_repeated_solves(optimizer):
    c = center()
    module = Proximal(c, optimizer=optimizer)
    first = module.w
    for repetition in range(3):
        c.grad = None
        assert module.solve(TARGET) is module
        expected = (2 * TARGET + 0.5 * c.detach()) / 2.5
        torch.testing.assert_close(module.w.detach(), expected)
        (module.w**2).sum().backward()
        torch.testing.assert_close(c.grad, 2 * expected * 0.2)
        assert [name for name, _ in module.named_parameters()] == ["w"], repetition
    assert first.is_leaf
    torch.testing.assert_close(first.detach(), expected)


def test_keyword_arguments_and_second_order():
    c = center()
    module = Proximal(c)
    module.solve(TARGET, scale=2.0)
    (g,) = torch.autograd.grad((module.w**3).sum(), c, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), c)
    torch.testing.assert_close(h, 6 * module.w.detach() * (0.5 / 4.5) ** 2)


def test_buffers_are_those_of_the_solve_alone():
    module = Proximal(center())
    module.solve(TARGET)
    module.w.sum().backward()
    assert module.calls == 0


class Changed(Proximal):
    """A subclass that inherits `solve`."""

    def objective(self, target, *, scale=1.0):
        return super().objective(target, scale=scale) + 0 * self.w.sum()


class Optimality(Proximal):
    def optimality(self, target):
        return (2 * (self.w - target) + self.lam * (self.w - self.center),)


class Twice(Optimality):
    def solve(self, target):
        return super().solve(target)


@pytest.mark.parametrize("cls", [Changed, Optimality, Twice])
def test_subclasses_of_a_concrete_class(cls):
    c = center()
    cls(c).solve(TARGET).w.sum().backward()
    torch.testing.assert_close(c.grad, torch.full_like(TARGET, 0.2))


REPORTS = []


class Rough(Proximal, polish=1, report=REPORTS.append):
    """Its solution is inaccurate, but one Newton correction is exact for a quadratic objective."""

    def solve(self, target):
        with torch.no_grad():
            self.w.copy_(target)
        return self


class Checked(Rough, polish=0, tol=1e-8):
    pass


class Strict(Checked, on_fail="raise"):
    pass


def test_polish_report_and_tolerance_of_a_class():
    REPORTS.clear()
    c = center()
    module = Rough(c).solve(TARGET)
    torch.testing.assert_close(module.w.detach(), (2 * TARGET + 0.5 * c.detach()) / 2.5)
    module.w.sum().backward()
    torch.testing.assert_close(c.grad, torch.full_like(TARGET, 0.2))
    assert len(REPORTS) == 1
    assert REPORTS[0].gradient_error < 1e-12
    with pytest.warns(OptimalityWarning, match="1e-08"):
        Checked(c).solve(TARGET)
    with pytest.raises(OptimalityError, match="1e-08"):
        Strict(c).solve(TARGET)
    with pytest.raises(ValueError, match="on_fail"):
        type("Unrolled", (Rough,), {}, on_fail="unroll")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)
        nn.init.ones_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        return self.fc(x)


class Inner(
    ImplicitMetaGradientModule,
    linear_solve=solve_normal_cg(maxiter=5, atol=0, on_fail="ignore"),
):
    def __init__(self, meta):
        super().__init__()
        self.meta = meta
        self.net = copy.deepcopy(meta)

    def objective(self, x, y):
        pairs = zip(self.net.parameters(), self.meta.parameters())
        near = sum(0.5 * ((p - q) ** 2).sum() for p, q in pairs)
        return nn.functional.mse_loss(self.net(x), y) + near

    def solve(self, x, y):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=2e-2)
        with torch.enable_grad():
            for _ in range(100):
                optimizer.zero_grad()
                self.objective(x, y).backward()
                optimizer.step()
        return self


def test_ridge_of_the_tutorial():
    torch.manual_seed(0)
    x, w, b = torch.randn(20, 4), torch.randn(4, 1), torch.randn(1)
    y = x @ w + b + 0.5 * torch.randn(20, 1)
    meta = Net()
    inner = Inner(meta)
    for _ in range(2):
        meta.zero_grad()
        inner.solve(x, y)
        inner.net(x).mean().backward()
        weight = torch.tensor([[-0.0369, 0.0248, 0.0347, 0.0067]])
        torch.testing.assert_close(meta.fc.weight.grad, weight, rtol=0, atol=6e-5)
        torch.testing.assert_close(meta.fc.bias.grad, torch.tensor([0.3156]), rtol=0, atol=6e-5)


def test_class_errors():
    with pytest.raises(TypeError, match="requires either an optimality.. method or an objective"):

        class Neither(ImplicitMetaGradientModule):
            def solve(self):
                return self

    with pytest.raises(TypeError, match="method optimality.. must not be a staticmethod."):

        class Static(ImplicitMetaGradientModule):
            @staticmethod
            def optimality():
                return ()

    with pytest.raises(TypeError, match="method objective.. must not be a classmethod."):

        class Class(ImplicitMetaGradientModule):
            @classmethod
            def objective(cls):
                return ()

    with pytest.raises(TypeError, match="method objective.. must be callable."):

        class Value(ImplicitMetaGradientModule):
            objective = 3

    class Abstract(ImplicitMetaGradientModule):
        def objective(self):
            return self.w.sum()

    with pytest.raises(TypeError, match="Can't instantiate abstract class"):
        Abstract()


def test_modules_without_parameters_or_meta_parameters():
    module = Proximal(center())
    module.center = center().detach()
    with pytest.raises(RuntimeError, match="The module has no meta-parameters."):
        module.solve(TARGET)
    module = Proximal(center())
    del module.w
    with pytest.raises(RuntimeError, match="The module has no parameters."):
        module.solve(TARGET)


def test_meta_parameters_are_not_parameters():
    c, net = center(), nn.Linear(2, 2)

    class Holder(MetaGradientModule):
        def __init__(self, c, net):
            super().__init__()
            self.c = c
            self.net = net
            self.own = nn.Linear(1, 1)
            self.plain = torch.ones(3, requires_grad=True)
            self.constant = torch.ones(3)

    module = Holder(c, net)
    assert sorted(n for n, _ in module.named_parameters()) == ["own.bias", "own.weight", "plain"]
    names = [n for n, _ in module.named_meta_parameters()]
    assert names == ["c", "net.weight", "net.bias"]
    assert list(module.meta_modules()) == [net]
    assert module.c is c
    assert "constant" not in module._buffers
    assert set(module.state_dict()) == {"own.bias", "own.weight", "plain"}
    module.eval()
    assert net.training


def test_registration_errors():
    c, net = center(), nn.Linear(2, 2)
    module = MetaGradientModule(c, net)
    x = torch.ones(1, requires_grad=True)
    module.z = x
    with pytest.raises(TypeError, match="parameter name should be a string. Got bytes"):
        module.register_parameter(b"x", x)
    with pytest.raises(KeyError, match="parameter name can't contain '.'"):
        module.register_meta_parameter("x.y", c)
    with pytest.raises(KeyError, match="parameter name can't be empty string ''"):
        module.register_parameter("", x)
    with pytest.raises(KeyError, match="attribute 'z' already exists"):
        module.register_meta_parameter("z", c)
    with pytest.raises(ValueError, match="is a meta-parameter to parameter 'x'. Use self.register"):
        module.register_parameter("x", c)
    with pytest.raises(ValueError, match="that `requires_grad=False` to parameter"):
        module.register_parameter("x", torch.ones(1))
    with pytest.raises(ValueError, match="is a meta-module to module 'x'. Use self.add_meta"):
        module.add_module("x", net)

    class Early(MetaGradientModule):
        def __init__(self, value):
            self.value = value

    for value, kind in ((x, "parameters"), (nn.Linear(1, 1), "module")):
        with pytest.raises(AttributeError, match=f"cannot assign {kind} before Module.__init__"):
            Early(value)


def test_swap_state_restores_a_module_that_is_in_two_places():
    part = torch.nn.Linear(1, 1)
    net = torch.nn.ModuleDict({"a": part, "b": part})
    old, new = part.weight, [torch.nn.Parameter(torch.zeros(1, 1)) for _ in range(3)]
    named = {"a.weight": new[0], "b.weight": new[1]}
    before = swap_state(net, named)
    assert part.weight is new[1]
    swap_state(net, before)
    assert part.weight is old
    for twice in ([*named.items(), ("c", new[2])], [("a.weight", x) for x in new] + [("c", old)]):
        with pytest.raises(KeyError, match="^'c: "):
            swap_state(net, twice)
        assert part.weight is old
    swap_state(net, swap_state(net, [("a.weight", x) for x in new]))
    assert part.weight is old


def test_swap_state_and_reparametrize():
    net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    old = net[0].weight
    new = torch.full((1, 1), 3.0)
    previous = swap_state(net, {"0.weight": new, "1.running_mean": torch.ones(1)})
    assert net[0].weight is new
    swap_state(net, previous)
    assert net[0].weight is old
    assert net[1].running_mean == 0
    with pytest.raises(KeyError, match="nothing"):
        swap_state(net, {"0.weight": new, "nothing": new})
    assert net[0].weight is old
    with reparametrize(net, {"0.weight": new}):
        assert net[0].weight is new
    assert net[0].weight is old


@pytest.mark.parametrize("wrap", [lambda m: nn.Sequential(m, nn.Linear(2, 1)), nn.ModuleList])
def test_a_meta_module_inside_another_is_not_part_of_the_inner_problem(wrap):
    class Inner(torchopt.nn.MetaGradientModule):
        def __init__(self, meta):
            super().__init__()
            self.net = wrap(meta if wrap is not nn.ModuleList else [meta])

    with pytest.raises(ValueError, match=r"got one with '0', which was given to the constructor"):
        Inner(nn.Linear(2, 2))


def test_a_meta_parameter_inside_a_module_is_not_part_of_the_inner_problem():
    class Inner(torchopt.nn.MetaGradientModule):
        def __init__(self, meta):
            super().__init__()
            layer = nn.Linear(2, 2)
            layer.weight = meta
            self.layer = layer

    with pytest.raises(ValueError, match=r"got one with 'weight', which was given"):
        Inner(nn.Parameter(torch.zeros(2, 2)))


def test_a_module_that_was_given_is_a_meta_module():
    class Inner(torchopt.nn.MetaGradientModule):
        def __init__(self, meta):
            super().__init__()
            self.net = meta
            self.own = nn.Sequential(nn.Linear(2, 2))

    module = Inner(nn.Sequential(nn.Linear(2, 2)))
    assert [name for name, _ in module.named_parameters()] == ["own.0.weight", "own.0.bias"]
    assert [name for name, _ in module.named_meta_parameters()] == ["net.0.weight", "net.0.bias"]
