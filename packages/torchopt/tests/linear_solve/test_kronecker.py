# SPDX-License-Identifier: Apache-2.0
"""Kronecker-factored preconditioners against the Gauss-Newton matrix; saved iterations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchopt.linear_solve import (
    CG,
    Kronecker,
    LinearOperator,
    Neumann,
    kronecker,
    linear_solve,
)

CROSS_ENTROPY = nn.functional.cross_entropy


def squared(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum() / 2


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tree.values()])


def like(net: nn.Module, v: Tensor) -> dict[str, Tensor]:
    params = dict(net.named_parameters())
    parts = v.split([p.numel() for p in params.values()])
    return {k: x.reshape(p.shape) for (k, p), x in zip(params.items(), parts)}


def gauss_newton(net: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return E[J' H J], by torch.func."""
    w = flat(dict(net.named_parameters())).detach()

    def output(w: Tensor, row: Tensor) -> Tensor:
        return functional_call(net, like(net, w), (row[None],))[0]

    jacobians = torch.func.vmap(torch.func.jacrev(output), (None, 0))(w, x)
    outputs = torch.func.vmap(output, (None, 0))(w, x)
    hessians = torch.func.vmap(torch.func.hessian(loss))(outputs, y)
    return torch.einsum("nci,ncd,ndj->ij", jacobians, hessians, jacobians) / len(x)


def matrix_of(M: Any, net: nn.Module) -> Tensor:
    n = sum(p.numel() for p in net.parameters())
    return torch.stack([flat(M(like(net, e))) for e in torch.eye(n, dtype=torch.float64)], 1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("corrected", [True, False])
def test_one_layer_and_squared_error_are_inverted_exactly(corrected: bool) -> None:
    """The Gauss-Newton matrix of |W a - y|^2 / 2 is I (x) E[a a'] itself."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2).double(), draw(20, 3), draw(20, 2)
    M = kronecker(net, squared, x, y, ridge=0.1, corrected=corrected)
    assert type(M) is Kronecker
    exact = gauss_newton(net, squared, x, y) + 0.1 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(matrix_of(M, net), torch.linalg.inv(exact))


def test_a_convolution_of_one_position_is_a_linear_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten()).double()
    x, y = draw(30, 2, 2, 2), draw(30, 3)
    M = kronecker(net, squared, x, y, ridge=0.1)
    exact = gauss_newton(net, squared, x, y) + 0.1 * torch.eye(27, dtype=torch.float64)
    torch.testing.assert_close(matrix_of(M, net), torch.linalg.inv(exact))


def test_the_corrected_factors_have_the_diagonal_of_the_curvature_in_their_basis() -> None:
    """They are also never farther from a block of it than uncorrected factors."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = draw(40, 4), torch.randint(3, (40,))
    exact = gauss_newton(net, CROSS_ENTROPY, x, y)
    errors = []
    for corrected in (True, False):
        M = kronecker(net, CROSS_ENTROPY, x, y, ridge=1e-3, corrected=corrected)
        inverse = matrix_of(M, net)
        torch.testing.assert_close(inverse, inverse.mT)
        assert torch.linalg.eigvalsh(inverse)[0] > 0
        curvature = torch.linalg.inv(inverse) - 1e-3 * torch.eye(len(inverse)).double()
        torch.testing.assert_close(curvature[:15, 15:], torch.zeros(15, 12).double())
        blocks = [slice(0, 15), slice(15, 27)]
        errors.append(sum(((curvature - exact)[b, b] ** 2).sum() for b in blocks))
        if corrected:
            trace = exact.diagonal().sum()
            torch.testing.assert_close(curvature.diagonal().sum(), trace)
    assert 0 < errors[0] < errors[1]


RIDGE = 1e-3


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a network on the digits at the minimum of its mean loss and RIDGE / 2 |w|^2, its
    batch, and the Hessian of both: the system of the implicit derivatives of that minimum.
    """
    table = pytest.importorskip("sklearn.datasets").load_digits()
    x = (torch.tensor(table.data[:300]) / 16 - 0.305) / 0.376
    y = torch.tensor(table.target[:300])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    weights = list(net.parameters())
    optimizer = torch.optim.LBFGS(
        weights, max_iter=400, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = CROSS_ENTROPY(net(x), y) + RIDGE / 2 * sum((w**2).sum() for w in weights)
        value.backward()
        return value

    optimizer.step(objective)
    w = flat(dict(net.named_parameters())).detach()

    def loss(w: Tensor) -> Tensor:
        return CROSS_ENTROPY(functional_call(net, like(net, w), (x,)), y)

    hessian = torch.autograd.functional.hessian(loss, w, vectorize=True)
    return net, x, y, hessian + RIDGE * torch.eye(len(w), dtype=torch.float64)


def system(digits: Any, corrected: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, a right-hand side and the preconditioner as a matrix."""
    net, x, y, A = digits
    M = matrix_of(kronecker(net, CROSS_ENTROPY, x, y, ridge=RIDGE, corrected=corrected), net)
    return A, flat(dict(net.named_parameters())).detach().sign(), (M + M.mT) / 2


@pytest.mark.parametrize("accuracy", [1e-2, 1e-6])
def test_conjugate_gradients_take_at_most_half_of_the_iterations(
    digits: Any, accuracy: float
) -> None:
    A, b, M = system(digits)
    assert torch.linalg.eigvalsh(A)[0] > 0
    exact = torch.linalg.solve(A, b)

    def error(count: int, M: Tensor | None) -> float:
        solver = CG(rtol=0, maxiter=count, M=M, on_fail="ignore")
        found = linear_solve(A, b, solver, on_fail="ignore").value
        return float((found - exact).norm() / exact.norm())

    low, high = 0, 512  # the fewest iterations without a preconditioner
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(middle, None) > accuracy else (low, middle)
    assert error(high, None) <= accuracy < error(high - 1, None)
    assert high > 20
    assert error(high // 2, M) <= accuracy


def test_the_neumann_series_takes_at_most_half_of_the_terms(digits: Any) -> None:
    A, b, M = system(digits)
    exact = torch.linalg.solve(A, b)
    root = torch.linalg.cholesky(M)
    tops = torch.linalg.eigvalsh(A)[-1], torch.linalg.eigvalsh(root.mT @ A @ root)[-1]
    errors = []
    for terms, precondition, top in ((100, None, tops[0]), (50, M, tops[1])):
        solver = Neumann(terms, alpha=1 / float(top), M=precondition, on_fail="ignore")
        value = linear_solve(A, b, solver, on_fail="ignore").value
        errors.append(float((value - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] < 1, errors


@pytest.mark.parametrize("way", ["forward", "backward", "transposed state"])
def test_a_preconditioned_series_has_the_error_of_its_formula(way: str) -> None:
    """(I - a M A)^(K + 1) A^-1 b, also for the transposed system, whose matrix is A'."""
    torch.manual_seed(2)
    A = torch.eye(4).double() + 0.2 * draw(4, 4)
    M = torch.linalg.inv(A + 0.2 * draw(4, 4))
    b, alpha, K = draw(4), 0.7, 3
    solver, eye = Neumann(K, alpha=alpha, M=M, on_fail="ignore"), torch.eye(4).double()
    if way == "forward":
        value = linear_solve(A, b, solver, on_fail="ignore").value
    else:
        if way == "backward":
            b = b.requires_grad_()
            found = linear_solve(A, b, solver, on_fail="ignore").value
            (value,) = torch.autograd.grad(found, b, c := draw(4))
            b = c
        else:
            state = solver.init(LinearOperator.from_matrix(A).bound(), b)
            value = solver.compute(solver.transpose(state), b).value
        A, M = A.mT, M.mT
    exact = torch.linalg.solve(A, b)
    error = torch.linalg.matrix_power(eye - alpha * M @ A, K + 1) @ exact
    torch.testing.assert_close(exact - value, error)


@pytest.mark.parametrize("corrected", [True, False])
def test_a_sequence_has_a_row_for_each_position(corrected: bool) -> None:
    """The factors are sums over samples and positions, E[g g'] of both and E[a a'] of samples; the
    correction puts the sums of their products on the diagonal in the basis of the factors.
    """
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    net.double()
    x, y = draw(20, 2, 3), draw(20, 2)
    inverse = matrix_of(kronecker(net, squared, x, y, ridge=0.1, corrected=corrected), net)
    curvature = torch.linalg.inv(inverse[:12, :12]) - 0.1 * torch.eye(12).double()
    weight, out = (p.detach() for p in (net[0].weight, net[3].weight))
    slopes = 1 - torch.tanh(x @ weight.mT) ** 2
    g = out.reshape(2, 1, 2, 4) * slopes  # classes, samples, positions, units
    of_g, of_a = torch.einsum("cnti,cntj->ij", g, g) / 40, torch.einsum("nti,ntj->ij", x, x) / 20
    expected = torch.kron(of_g, of_a)
    if corrected:
        basis = torch.kron(torch.linalg.eigh(of_g)[1], torch.linalg.eigh(of_a)[1])
        sums = torch.einsum("cnti,cntj,ntk,ntl->ikjl", g, g, x, x).reshape(12, 12) / 20
        expected = basis @ (basis.mT @ sums @ basis).diagonal().diag() @ basis.mT
    torch.testing.assert_close(curvature, expected)


def test_layers_without_factors_and_bad_settings_raise() -> None:
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    with pytest.raises(TypeError, match="LayerNorm at '0'"):
        kronecker(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), CROSS_ENTROPY, x, y, ridge=0.1)
    with pytest.raises(ValueError, match="ridge"):
        kronecker(nn.Linear(3, 2), CROSS_ENTROPY, x, y, ridge=0.0)
    layer = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="once"):
        kronecker(nn.Sequential(layer, layer), CROSS_ENTROPY, x, y, ridge=0.1)


@pytest.mark.parametrize("frozen", [False, True])
def test_activations_in_place_and_frozen_layers_change_no_factor(frozen: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)]
    x, y = torch.randn(20, 3).double(), torch.randint(2, (20,))
    found = []
    for inplace in (False, True):
        net = torch.nn.Sequential(layers[0], torch.nn.ReLU(inplace), layers[1]).double()
        net.requires_grad_(not (frozen and inplace))
        M = kronecker(net, torch.nn.functional.cross_entropy, x, y, ridge=0.1)
        found.append(M({k: p.detach() for k, p in net.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_a_parameter_of_two_layers_is_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    x, y = torch.randn(20, 3), torch.randint(3, (20,))
    with pytest.raises(TypeError, match="share"):
        kronecker(net, torch.nn.functional.cross_entropy, x, y, ridge=0.1)


def test_buffers_stay_as_they_are_and_no_samples_are_refused() -> None:
    norm = torch.nn.BatchNorm1d(5, affine=False)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), norm, torch.nn.Linear(5, 2))
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    loss = torch.nn.functional.cross_entropy
    kronecker(net, loss, x, y, ridge=0.1)
    assert norm.num_batches_tracked == 0
    assert norm.running_mean is not None
    assert not norm.running_mean.any()
    with pytest.raises(ValueError, match="one sample"):
        kronecker(net, loss, x[:0], y[:0], ridge=0.1)


def test_frozen_layers_may_be_left_out_of_the_trees() -> None:
    torch.manual_seed(0)
    x, y = draw(9, 3), torch.randint(3, (9,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    whole = kronecker(net, CROSS_ENTROPY, x, y, ridge=0.1)(dict(net.named_parameters()))
    net[0].requires_grad_(False)
    tree = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = kronecker(net, CROSS_ENTROPY, x, y, ridge=0.1)(tree)
    assert list(found) == ["2.weight", "2.bias"]
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name])


def test_trees_that_are_not_the_layers_are_refused() -> None:
    net = nn.Linear(3, 2).double()
    M = kronecker(net, squared, draw(9, 3), draw(9, 2), ridge=0.1)
    assert M({}) == {}
    with pytest.raises(TypeError, match="expected a dict of parameters by name, got list"):
        M([net.weight])
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match="is missing"):
            M({name: net.get_parameter(name)})
    with pytest.raises(ValueError, match="'w' is unknown"):
        M({**dict(net.named_parameters()), "w": net.weight})
    with pytest.raises(ValueError, match="2 rows of 3 entries at 'weight', got the shape"):
        M({"weight": net.weight[:1], "bias": net.bias})


class Called(nn.Module):
    """A layer called by keyword, optionally with outputs in a tuple."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        self.layer, self.wrapped = nn.Linear(3, 2).double(), wrapped

    def forward(self, x: Tensor) -> Any:
        out = self.layer(input=x)
        return (out,) if self.wrapped else out


def test_a_layer_may_be_called_by_keyword() -> None:
    torch.manual_seed(0)
    net, x, y = Called(False), draw(20, 3), draw(20, 2)
    M = kronecker(net, squared, x, y, ridge=0.1)
    exact = gauss_newton(net, squared, x, y) + 0.1 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(matrix_of(M, net), torch.linalg.inv(exact))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"targets": torch.zeros(3)}, ValueError, "one for each of the 5 inputs"),
        ({"inputs": [1.0]}, TypeError, r"expected tensors \[samples, ...\], got list"),
        ({"loss": lambda out, y: out}, ValueError, r"0-dim tensor for one sample.*\(2,\)"),
        ({"module": nn.Tanh()}, TypeError, "expected parameters, got Tanh without any"),
        ({"module": nn.Linear(3, 2, dtype=torch.complex64)}, TypeError, "expected real parameters"),
        ({"module": Called(True)}, ValueError, "expected outputs .* got tuple"),
        ({"ridge": float("inf")}, ValueError, "ridge: expected a number > 0"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_hook(
    options: dict[str, Any], error: Any, told: str
) -> None:
    net = nn.Linear(3, 2).double()
    given = {"module": net, "loss": squared, "inputs": draw(5, 3), "targets": draw(5, 2)}
    given |= {"ridge": 0.1, **options}
    with pytest.raises(error, match=told):
        kronecker(**given)
    assert not any(layer._forward_hooks for layer in given["module"].modules())


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of torch.inference"):
        kronecker(nn.Linear(3, 2), squared, torch.zeros(5, 3), torch.zeros(5, 2), ridge=0.1)


def test_outputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected outputs \[samples, classes\]"):
        kronecker(nn.Linear(3, 3).double(), CROSS_ENTROPY, draw(5, 2, 3), torch.zeros(5), ridge=0.1)


def test_a_network_that_draws_random_numbers_is_refused_and_draws_none() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = draw(6, 3), draw(6, 2)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"draws random numbers.*module.eval\(\)"):
        kronecker(net, squared, x, y, ridge=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    kronecker(net.eval(), squared, x, y, ridge=0.1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["inputs", "targets", "parameters"])
def test_a_curvature_that_is_not_finite_is_refused(where: str) -> None:
    net, x, y = nn.Linear(3, 2).double(), torch.ones(6, 3).double(), torch.ones(6, 2).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 4).sum()

    broken = {"inputs": x, "targets": y, "parameters": net.weight}[where]
    broken.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected a finite curvature"):
        kronecker(net, loss, x, y, ridge=0.1)


def test_half_precision_has_the_factors_of_single() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    x, y = draw(20, 3).bfloat16(), draw(20, 2).bfloat16()
    v = {k: torch.randn_like(p) for k, p in net.named_parameters()}
    half = kronecker(net, squared, x, y, ridge=0.5)(v)
    assert all(u.dtype is torch.bfloat16 for u in half.values())
    single = kronecker(net.float(), squared, x.float(), y.float(), ridge=0.5)(
        {k: u.float() for k, u in v.items()}
    )
    # Activations, slopes and results are rounded to 8 bits, by 2^-9 of their size at most.
    assert (flat(half).float() - flat(single)).norm() < 2**-8 * flat(single).norm()
