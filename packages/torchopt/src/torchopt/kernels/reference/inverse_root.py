# SPDX-License-Identifier: Apache-2.0
r"""Inverse roots of positive definite matrices.

The value and the first derivative come from an eigendecomposition. The derivative of an
eigendecomposition divides by differences of eigenvalues, and a sum of a few outer products has many
equal eigenvalues. The derivative of a root does not divide by them. With
:math:`A = V \Lambda V^T`, :math:`a_i = \lambda_i^{1/p}` and a cotangent G, it is

.. math::
    \bar A = V (K \circ V^T G V) V^T, \qquad
    K_{ij} = \frac{a_i^{-1} - a_j^{-1}}{a_i^p - a_j^p}
           = \frac{-1}{a_i a_j \sum_{k=0}^{p-1} a_i^{p-1-k} a_j^k}

(J. Daleckii, S. Krein 1965; N. J. Higham, Functions of Matrices, 2008, theorem 3.11), in which
nothing cancels. Higher derivatives are those of an iteration that consists of matrix products
only. It is differentiable to any order, can be batched by vmap and compiled, whatever the
eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.tree_function import Operation, apply_operation

__all__ = ["inverse_root", "newton_inverse_root"]


def inverse_root(a: Tensor, p: int, steps: int = 50) -> Tensor:
    r"""Return :math:`A^{-1/p}` of symmetric positive definite matrices.

    Eigenvalues smaller than the rounding error of the largest one are raised to that error. The
    result is NaN for a matrix that is not finite or that has negative eigenvalues beyond rounding.
    Only the matrices are saved for the derivative.

    Args:
        a: `[*batch, n, n]`; only the symmetric part is used.
        p: The root, >= 1.
        steps: The number of iterations of `newton_inverse_root`, for higher derivatives and under
            torch.compile.

    Returns:
        The roots, `[*batch, n, n]`.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([4.0, 9.0])), 2)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.3333]])
    """

    def by_eigenvalues(a: Tensor) -> tuple[Tensor]:
        vectors, roots = _decomposed(a, p)
        return ((vectors / roots.unsqueeze(-2)) @ vectors.mT,)

    def pulled(a: Tensor, cotangent: Tensor) -> tuple[Tensor]:
        vectors, roots = _decomposed(a, p)
        rows, columns = roots.unsqueeze(-1), roots.unsqueeze(-2)
        total = sum(rows ** (p - 1 - k) * columns**k for k in range(p))
        inner = vectors.mT @ cotangent @ vectors
        return (vectors @ (inner / (-rows * columns * total)) @ vectors.mT,)

    def iterated(a: Tensor) -> tuple[Tensor]:
        return (newton_inverse_root(a, p, steps),)

    symmetric = (a + a.mT) / 2
    if not symmetric.numel():
        return symmetric
    return apply_operation(Operation(by_eigenvalues, pulled, iterated, 1), symmetric)[0]


def _decomposed(a: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors `[*batch, n, n]` and the p-th roots of the eigenvalues."""
    finite = torch.isfinite(a).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, a, identity))
    largest = values[..., -1:]
    rounding = torch.finfo(a.dtype).eps * largest
    positive = finite.squeeze(-1) & (values > -8 * a.shape[-1] * rounding)
    values = torch.where(positive, torch.maximum(values, rounding), torch.nan)
    return vectors, values ** (1 / p)


def newton_inverse_root(a: Tensor, p: int, steps: int = 50) -> Tensor:
    r"""Return :math:`A^{-1/p}` by the coupled Newton iteration.

    .. math::
        T = \frac{(p + 1) I - M}{p}, \qquad X' = X T, \qquad M' = T^p M

    from :math:`M = z A`, :math:`X = z^{1/p} I` with :math:`z = (p + 1) / (2 \|A\|_F)`. Every step
    multiplies the small eigenvalues of M by at least 2 until they are near one. From then on every
    step squares the error. Forty steps are enough for condition numbers up to 1e11, fifty up to
    1e15.

    Args:
        a: Symmetric positive definite matrices `[*batch, n, n]`.
        p: The root, >= 1.
        steps: The number of iterations.

    Returns:
        The roots, `[*batch, n, n]`.

    References:
        N. J. Higham, Functions of Matrices, 2008, equation 7.18.

        C. Guo, N. J. Higham, A Schur-Newton Method for the Matrix p'th Root and its Inverse, 2006.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = (p + 1) / (2 * (a * a).sum(dim=(-2, -1), keepdim=True).sqrt())
    m, x = a * z, identity * z ** (1 / p)
    for _ in range(steps):
        t = ((p + 1) * identity - m) / p
        x = x @ t
        m = torch.linalg.matrix_power(t, p) @ m
    return x
