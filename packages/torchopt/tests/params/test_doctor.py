# SPDX-License-Identifier: Apache-2.0
"""Second derivatives against differences: wrong ones are named, correct ones pass."""

from __future__ import annotations

import warnings
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchopt.errors import NotDifferentiableError, SecondDerivativeWarning
from torchopt.params import SecondDerivatives, check_second_order, functional_call


def point(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def test_all_three_ways_give_the_product_of_a_known_hessian() -> None:
    matrix = point(4, 4).detach()
    found = check_second_order(lambda p: 0.5 * (p["x"] * (matrix @ p["x"])).sum(), {"x": point(4)})
    assert found is not None
    assert found.forward is not None
    assert found.difference is not None
    # u · H v of a quadratic does not depend on the point: H is the symmetric part.
    symmetric = 0.5 * (matrix + matrix.T)
    from torchopt.params.doctor import Line

    line = Line(lambda p: 0.5 * (p * (matrix @ p)).sum(), point(4))
    expected = float(line.weights[0] @ symmetric @ line.direction[0])
    for value, tolerance in (
        (found.reverse, 1e-13),
        (found.forward, 1e-13),
        (found.difference, 1e-7),
    ):
        assert abs(value - expected) < tolerance * abs(expected)


class NoSecond(torch.autograd.Function):
    """exp, whose backward forgets that it depends on the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @classmethod
    def slope(cls, x: Tensor) -> Tensor:
        return x.detach().exp()

    @classmethod
    def backward(cls, ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * cls.slope(*ctx.saved_tensors)


class WrongFirst(NoSecond):
    """exp, whose first derivative is a tenth too large."""

    @classmethod
    def slope(cls, x: Tensor) -> Tensor:
        return 1.1 * x.exp()


def det_of_forward(p: Tensor) -> Tensor:
    return torch.func.jacrev(torch.func.jacfwd(torch.det))(p)


# name: (the function, a part of the message)
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "zero second derivative": (NoSecond.apply, r"second derivative of NoSecondBackward"),
    "deep inside": (lambda p: NoSecond.apply(p.sin() @ p).tanh(), r"second derivative of NoSecond"),
    "wrong first derivative": (
        lambda p: WrongFirst.apply(p.cos()),
        r"first derivative of WrongFirstBackward",
    ),
    "reverse over forward mode": (det_of_forward, r"second derivative of torch\.det"),
    "forward mode inside": (torch.func.jacfwd(torch.det), r"second derivative of torch\.det"),
}


def test_a_small_share_of_the_second_derivative_is_noticed() -> None:
    """The wrong term is 3e-5 of the product, the error of the differences 3e-9."""
    params = {"large": point(3), "small": point(3)}
    message = r"second derivative of NoSecondBackward"
    with pytest.raises(NotDifferentiableError, match=message):
        check_second_order(
            lambda p: 1e4 * p["large"].pow(4).sum() + NoSecond.apply(p["small"]).pow(2).sum(),
            params,
            forward=False,
        )


@pytest.mark.parametrize("name", sorted(WRONG))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_operation_whose_derivative_is_wrong_is_named(name: str, dtype: torch.dtype) -> None:
    function, message = WRONG[name]
    w = point(3, 3).detach().to(dtype).requires_grad_()
    with pytest.raises(NotDifferentiableError, match=message) as caught:
        check_second_order(lambda p: function(p).pow(2).sum() + p.sin().sum(), w, forward=False)
    assert len(str(caught.value)) < 400


def test_the_kernel_of_weight_norm_is_refused_where_it_is_wrong() -> None:
    """Its double backward is wrong on the CPU in torch 2.13, as torch's own check confirms."""
    params = {"v": point(3, 3), "g": point(3, 1)}
    right = torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, 0),
        (params["v"], params["g"]),
        raise_exception=False,
    )
    net, x = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), point(4, 3).detach().float()

    def check() -> None:
        check_second_order(
            lambda p: functional_call(net, p, (x,)).pow(2).sum(),
            dict(net.named_parameters()),
            forward=False,
        )

    if right:
        check()
    else:
        with pytest.raises(
            NotDifferentiableError, match=r"WeightNorm.*write the normalisation out"
        ):
            check()


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        def block(y: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.sin(self.a(y))))

        out: Tensor = checkpoint(block, x, use_reentrant=False)
        return out


def test_a_recomputation_with_other_weights_is_named() -> None:
    net, x = Recomputed(), point(4, 3).detach().float()
    params = dict(net.named_parameters())
    with pytest.raises(NotDifferentiableError, match=r"torchopt\.params\.functional_call"):
        check_second_order(
            lambda p: torch.func.functional_call(net, p, (x,)).pow(2).sum(), params, forward=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", SecondDerivativeWarning)
        found = check_second_order(lambda p: functional_call(net, p, (x,)).pow(2).sum(), params)
    assert found is not None
    assert found.forward is not None
    assert found.forward == pytest.approx(found.reverse)


def target(p: Tensor) -> Tensor:
    with torch.no_grad():
        fixed = p.sin() * 2
    return p.cos() - fixed


def inner_loop(create_graph: bool) -> Callable[[Tensor], Tensor]:
    def run(p: Tensor) -> Tensor:
        q = p
        for _ in range(2):
            (g,) = torch.autograd.grad((q.sin() * q).sum(), q, create_graph=create_graph)
            q = q - 0.1 * g
        return q

    return run


# Correct, although a naive comparison with differences would disagree.
RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "random numbers of its own": lambda p: p * torch.randn(3, generator=torch.Generator()),
    "cut by detach": lambda p: p * p.detach().sin(),
    "cut by no_grad": target,
    "cut by a comparison": lambda p: p.exp() * (p > 0).to(p.dtype),
    "dropout": lambda p: torch.dropout(p, 0.5, True).exp(),
    "an inner loop": inner_loop(True),
    "a first-order inner loop": inner_loop(False),
    "sorted": lambda p: p.sort(0)[0].prod(0),
    "singular values": torch.linalg.svdvals,
    "in bfloat16": lambda p: (p.bfloat16() @ p.bfloat16()).float(),
    "in place": lambda p: p.clone().mul_(p).add_(1).sin_(),
    "complex": lambda p: torch.fft.fft(p).abs(),
    "linear": lambda p: p.cumsum(0),
    "a mask of minus infinity": lambda p: (
        (p @ p).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    ),
}


@pytest.mark.parametrize("name", sorted(RIGHT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correct_derivatives_are_not_refused(name: str, dtype: torch.dtype) -> None:
    w = point(3, 3).detach().to(dtype).requires_grad_()
    found = check_second_order(lambda p: RIGHT[name](p).pow(2).sum(), w, forward=False)
    assert isinstance(found, SecondDerivatives)
    assert found.difference is not None
    assert abs(found.reverse - found.difference) <= 1e-5 * abs(found.reverse) + 1e-9


def layers() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(1)
    flat, image, sequence = torch.randn(4, 8), torch.zeros(2, 4, 8, 8), torch.randn(5, 2, 8)
    image[:, :, 2:6, 2:6] = torch.randn(2, 4, 4, 4)  # zeros around: pixels that sit on kinks
    after = {
        "batch norm": nn.BatchNorm2d(6),
        "group norm": nn.GroupNorm(2, 6),
        "max pool": nn.MaxPool2d(2),
        "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
        "dropout": nn.Dropout2d(),
    }
    found: dict[str, tuple[nn.Module, Tensor]] = {
        name: (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), layer), image)
        for name, layer in after.items()
    }
    for name in ("GELU", "SiLU", "ELU", "Softplus", "LeakyReLU", "Hardtanh", "RReLU", "PReLU"):
        found[name] = nn.Sequential(nn.Linear(8, 8), getattr(nn, name)(), nn.Linear(8, 3)), flat
    words = torch.tensor([[1, 0, 2], [3, 3, 0]])
    found["padding"] = nn.Sequential(nn.Embedding(4, 5, padding_idx=0), nn.Tanh()), words
    found["layer norm"] = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), flat
    found["rnn"] = nn.RNN(8, 4), sequence
    found["gru"] = nn.GRU(8, 4, bidirectional=True), sequence
    found["transposed"] = nn.ConvTranspose2d(4, 3, 3), image
    found["attention"] = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequence
    return found


@pytest.mark.parametrize("name", sorted(layers()))
def test_layers_of_torch_are_not_refused(name: str) -> None:
    layer, x = layers()[name]
    before = {key: value.clone() for key, value in layer.state_dict().items()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        out = functional_call(layer, p, (x,))
        out = out[0] if isinstance(out, tuple) else out
        return (out.pow(2) * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).mean()

    kernels = [torch.nn.attention.SDPBackend.MATH]
    with warnings.catch_warnings(), torch.nn.attention.sdpa_kernel(kernels):
        warnings.simplefilter("error", SecondDerivativeWarning)
        found = check_second_order(loss, dict(layer.named_parameters()))
    assert found is not None
    assert found.difference is not None
    assert found.forward is not None
    assert abs(found.reverse - found.difference) < 1e-5 * abs(found.reverse)
    assert abs(found.reverse - found.forward) < 1e-9 * abs(found.reverse)
    for key, value in layer.state_dict().items():
        assert value.dtype == before[key].dtype, key


def test_losses_that_cannot_be_checked_are_reported() -> None:
    w = point(3)
    times = iter(range(1, 100))
    with pytest.warns(SecondDerivativeWarning, match="another value at each call"):
        assert check_second_order(lambda p: next(times) * p.exp().sum(), w) is None
    calls = iter(range(100))

    def other_path(p: Tensor) -> Tensor:
        return p.exp().sum() if next(calls) % 2 else p.sin().exp().sum()

    with pytest.warns(SecondDerivativeWarning, match="another path"):
        check_second_order(other_path, w, forward=False)
    with pytest.warns(SecondDerivativeWarning, match="not finite"):
        check_second_order(lambda p: (p / 0).sum(), w, forward=False)


def test_the_state_of_the_caller_does_not_change() -> None:
    w = point(3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check_second_order(lambda p: p.exp().sum(), w)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.rand(1), expected)
    assert w.grad is None


def test_parameters_that_sit_on_a_kink_are_moved_off_it() -> None:
    w = torch.zeros(3, requires_grad=True)
    found = check_second_order(lambda p: (torch.relu(p) + p.sin()).pow(2).sum(), w)
    assert found is not None
    assert found.difference is not None
    assert abs(found.reverse - found.difference) < 1e-6 * abs(found.reverse)


def test_tensors_that_a_loss_writes_to_keep_their_identity() -> None:
    held = torch.zeros(3)
    w = point(3).detach().float().requires_grad_()

    def loss(p: Tensor) -> Tensor:
        assert held.copy_(p.detach()) is held
        assert torch.mul(p.detach(), 2, out=held) is held
        return (p.exp() * held).sum()

    found = check_second_order(loss, w)
    assert found is not None
    assert held.dtype == torch.float32


class Batched(torch.autograd.Function):
    """exp for vmap, with a forward mode that returns nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] * ctx.saved_tensors[0].exp()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_an_assertion_of_torch_in_forward_mode_is_reported() -> None:
    def loss(p: Tensor) -> Tensor:
        slopes = torch.func.vmap(torch.func.grad(lambda row: Batched.apply(row).sum()))(p)
        return slopes.sin().sum() + p.sin().sum()

    with pytest.warns(SecondDerivativeWarning, match="refuses to compute it in forward over rev"):
        found = check_second_order(loss, point(3, 3))
    assert found is not None
    assert found.forward is None
    assert found.reverse == pytest.approx(found.difference, rel=1e-6)


class NoSecondOfComplex(NoSecond):
    @classmethod
    def slope(cls, x: Tensor) -> Tensor:
        return x.detach().exp().conj()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_checked(dtype: torch.dtype) -> None:
    w = torch.complex(point(3).detach(), point(2, 3).detach()[1]).to(dtype).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SecondDerivativeWarning)
        # Not holomorphic, with constants of single precision.
        found = check_second_order(
            lambda p: (
                ((p.exp() * torch.ones(3, dtype=torch.complex64)).abs() ** 2).sum()
                + (p * p).real.sin().sum()
            ),
            w,
        )
    assert found is not None
    assert found.forward == pytest.approx(found.reverse, rel=1e-12)
    assert found.difference == pytest.approx(found.reverse, rel=1e-6)
    with pytest.raises(NotDifferentiableError, match="second derivative of NoSecondOfComplexBack"):
        check_second_order(lambda p: NoSecondOfComplex.apply(p).abs().pow(2).sum(), w)


def test_frozen_parameters_and_integers_are_constants() -> None:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    net[1].requires_grad_(False)
    params = {"w": dict(net.named_parameters()), "words": torch.tensor([[1, 0, 2], [3, 3, 0]])}
    # A frozen parameter may go through an operation without a second derivative.
    params["frozen"] = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SecondDerivativeWarning)
        found = check_second_order(
            lambda p: (
                functional_call(net, p["w"], (p["words"],)).pow(2).sum()
                + NoSecond.apply(p["frozen"]).sum()
            ),
            params,
        )
    assert found is not None
    assert found.difference == pytest.approx(found.reverse, rel=1e-6)
    assert found.forward == pytest.approx(found.reverse, rel=1e-9)


class WithTangent(torch.autograd.Function):
    """exp with a forward mode."""

    factor = 1.0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] * ctx.saved_tensors[0].exp()

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        return cls.factor * tangents[0] * ctx.saved_tensors[0].exp()


class WrongTangent(WithTangent):
    factor = 1.1


def test_the_forward_mode_of_a_function_is_checked() -> None:
    def loss(function: Any) -> Callable[[Tensor], Tensor]:
        return lambda p: function.apply(p.sin()).exp().pow(2).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error", SecondDerivativeWarning)
        found = check_second_order(loss(WithTangent), point(3))
    assert found is not None
    assert found.forward == pytest.approx(found.reverse, rel=1e-12)
    with pytest.raises(NotDifferentiableError, match=r"of WrongTangent.* in forward over reverse"):
        check_second_order(loss(WrongTangent), point(3))
