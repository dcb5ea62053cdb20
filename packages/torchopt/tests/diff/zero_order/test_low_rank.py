# SPDX-License-Identifier: Apache-2.0
"""Low-rank perturbations equal the materialised ones, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchopt.diff.zero_order.low_rank import LowRank

F64 = torch.float64


class Tied(nn.Module):
    """A weight used by an embedding, a linear layer and a plain product."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) * self.scale
        logits = nn.functional.linear(h, self.embedding.weight)
        return logits + h @ self.embedding.weight.T + self.embedding.weight.sum()


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)),
        lambda: torch.randn(4, 5, dtype=F64),
    ),
    "conv1d": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        lambda: torch.randn(2, 4, 9, dtype=F64),
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same"),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2, groups=4),
            nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
        ),
        lambda: torch.randn(3, 2, 6, 6, dtype=F64),
    ),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), lambda: torch.randn(1, 1, 3, 3, 3, dtype=F64)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(6, 4, padding_idx=1), nn.LayerNorm(4), nn.Linear(4, 2)),
        lambda: torch.tensor([[0, 5, 1], [2, 2, 3]]),
    ),
    "tied": (Tied, lambda: torch.tensor([[0, 5, 1], [2, 2, 3]])),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rank", [1, 3])
def test_equals_the_materialised_perturbation(name: str, rank: int) -> None:
    make, draw = NETS[name]
    net, x = make().double(), draw()
    engine = LowRank(rank, num_samples=4, sigma=0.3)
    params = dict(net.named_parameters())

    def loss(module: nn.Module) -> Tensor:
        return (module(x) ** 3).sum()

    noise = engine.noise(params, 0, 0, 4)
    full = noise.materialize({k: p.detach() for k, p in params.items()})
    assert all(full[k].shape == (4, *p.shape) for k, p in params.items())
    for s in (1.0, -1.0):
        got = engine.losses(net, loss, noise, s)
        for i in range(4):
            moved = {k: p.detach() + s * 0.3 * full[k][i] for k, p in params.items()}
            expected = (torch.func.functional_call(net, moved, (x,)) ** 3).sum()
            torch.testing.assert_close(got[i], expected, rtol=1e-10, atol=1e-10)


def test_gradient_equals_that_of_the_materialised_noise() -> None:
    make, draw = NETS["conv2d"]
    net, x = make().double(), draw()

    def loss(module: nn.Module) -> Tensor:
        return module(x).square().mean()

    whole = LowRank(2, num_samples=6, sigma=0.1)
    params = {k: p.detach() for k, p in net.named_parameters()}
    noise = whole.noise(params, 9, 0, 6)
    losses = [whole.losses(net, loss, noise, s) for s in (1.0, -1.0)]
    c = (losses[0] - losses[1]) / (2 * 0.1)
    full = noise.materialize(params)
    expected = {k: torch.tensordot(c, z, 1) / 6 for k, z in full.items()}
    for chunk_size in (None, 1, 4):
        engine = LowRank(2, num_samples=6, sigma=0.1, chunk_size=chunk_size)
        result = engine.estimate(net, loss, seed=9)
        torch.testing.assert_close(result.gradient, expected)
        each = {k: c.reshape(6, *(1,) * (z.ndim - 1)) * z for k, z in full.items()}
        error = {k: x.std(0) / 6**0.5 for k, x in each.items()}
        torch.testing.assert_close(result.standard_error, error)
        assert result.evaluations == 12
        squares = c.square().sum()
        assert result.effective_sample_size == pytest.approx((c.abs().sum() ** 2 / squares).item())
        without = engine.estimate(net, loss, seed=9, with_error=False)
        assert without.standard_error is None


@pytest.mark.parametrize("rank", [1, 4])
def test_covariance_is_the_identity(rank: int) -> None:
    n = 40_000
    weight = torch.zeros(2, 3, dtype=F64)
    E = LowRank(rank).noise({"w": weight}, 1, 0, n).materialize({"w": weight})["w"].flatten(1)
    products = E[:, :, None] * E[:, None, :]
    error = products.std(0) / n**0.5
    assert ((products.mean(0) - torch.eye(6, dtype=F64)).abs() < 4 * error + 1e-12).all()
    assert (E.mean(0).abs() < 4 / n**0.5).all()


def test_unbiased_on_a_linear_loss() -> None:
    net = nn.Linear(3, 2).double()
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=F64)
    weights = torch.tensor([2.0, -1.0], dtype=F64)
    n = 40_000
    got = LowRank(1, num_samples=n).estimate(net, lambda m: (m(x) @ weights).sum(), seed=0)
    gradient, error = got.gradient, got.standard_error
    truth = torch.outer(weights, x[0])
    assert ((gradient["weight"] - truth).abs() < 4 * error["weight"]).all()
    assert ((gradient["bias"] - weights).abs() < 4 * error["bias"]).all()


def test_wrong_options_are_reported() -> None:
    with pytest.raises(ValueError, match="`rank`: expected an integer of at least 1"):
        LowRank(0)
    with pytest.raises(ValueError, match="not spsa"):
        LowRank(1, "spsa")
    with pytest.raises(RuntimeError, match="no parameters that require gradients"):
        LowRank().estimate(nn.Tanh(), lambda m: torch.zeros(()))


class Loop(nn.Module):
    """Branches on a value, which vmap does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.sum().item() > 0 else -y


def test_functions_that_vmap_cannot_run_are_looped_over_after_one_warning() -> None:
    net, x = Loop().double(), torch.ones(4, 3, dtype=F64)
    engine = LowRank(1, num_samples=6, sigma=0.1, chunk_size=2)
    with pytest.warns(UserWarning, match="vmap cannot take this function") as caught:
        got = engine.estimate(net, lambda m: m(x).sum(), seed=0)
    assert len(caught) == 1
    loop = LowRank(1, num_samples=6, sigma=0.1, vectorized=False)
    torch.testing.assert_close(got, loop.estimate(net, lambda m: m(x).sum(), seed=0))
    with pytest.raises(RuntimeError, match="vmap"):
        LowRank(1, vectorized=True).estimate(net, lambda m: m(x).sum(), seed=0)


@pytest.mark.parametrize("method", ["antithetic", "forward"])
@pytest.mark.parametrize("vectorized", [True, False])
def test_buffers_do_not_change_and_masks_are_common(method: str, vectorized: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    net, x = net.double(), torch.randn(16, 4, dtype=F64)
    buffers = {k: b.clone() for k, b in net.named_buffers()}
    params = {k: p.detach().clone() for k, p in net.named_parameters()}
    engine = LowRank(1, method, num_samples=50, sigma=1e-5, vectorized=vectorized)
    got = engine.estimate(net, lambda m: m(x).square().mean(), seed=1)
    torch.testing.assert_close(dict(net.named_buffers()), buffers, rtol=0, atol=0)
    torch.testing.assert_close(dict(net.named_parameters()), params, rtol=0, atol=0)
    # another mask for each evaluation would make differences of order 1 / sigma
    assert all(g.abs().max() < 100 for g in got.gradient.values())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        lambda: nn.ConvTranspose1d(4, 3, 2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)),
        lambda: nn.Bilinear(6, 6, 2),
    ],
)
def test_layers_without_a_thin_product_are_materialised(make: Callable[[], nn.Module]) -> None:
    net, x = make().double(), torch.randn(2, 4, 6, dtype=F64)

    def loss(m: nn.Module) -> Tensor:
        return (m(x, x) if isinstance(m, nn.Bilinear) else m(x)).square().mean()

    engine = LowRank(2, num_samples=3, sigma=0.3)
    params = {k: p.detach() for k, p in net.named_parameters()}
    noise = engine.noise(params, 0, 0, 3)
    full = noise.materialize(params)
    got = engine.losses(net, loss, noise, 1.0)
    for i in range(3):
        moved = {k: p + 0.3 * full[k][i] for k, p in params.items()}
        with torch.no_grad():
            expected = copy.deepcopy(net)
            for k, p in expected.named_parameters():
                p.copy_(moved[k])
            torch.testing.assert_close(got[i], loss(expected), rtol=1e-10, atol=1e-10)


def test_a_loss_that_is_not_a_scalar_is_reported() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"`loss`: expected a 0-dim tensor, got \[4, 2\]"):
        LowRank().estimate(net, lambda m: m(torch.ones(4, 3)))
    with pytest.raises(ValueError, match="`sigma`"):
        LowRank(sigma=0.0)
    with pytest.raises(ValueError, match="`chunk_size`"):
        LowRank(chunk_size=0)
