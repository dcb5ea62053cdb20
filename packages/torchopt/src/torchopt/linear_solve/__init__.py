# SPDX-License-Identifier: Apache-2.0
"""Solve A x = b for trees of tensors by a suitable method; differentiable to any order."""

from __future__ import annotations

from torchopt.linear_solve.auto import Auto
from torchopt.linear_solve.bicgstab import BiCGSTAB
from torchopt.linear_solve.cg import CG, NormalCG, solve_cg
from torchopt.linear_solve.dense import LU, QR, Cholesky, Diagonal, Triangular
from torchopt.linear_solve.gmres import GMRES
from torchopt.linear_solve.inv import solve_inv
from torchopt.linear_solve.kronecker import Kronecker, kronecker
from torchopt.linear_solve.lsmr import LSMR
from torchopt.linear_solve.minres import MINRES
from torchopt.linear_solve.neumann import Neumann
from torchopt.linear_solve.normal_cg import solve_normal_cg
from torchopt.linear_solve.operator import LinearOperator, Tag
from torchopt.linear_solve.preconditioners import Jacobi, Nystrom
from torchopt.linear_solve.result import (
    LinearSolveError,
    LinearSolveWarning,
    Solution,
    Stats,
    Status,
)
from torchopt.linear_solve.solver import Solver, linear_solve
from torchopt.linear_solve.stochastic import StochasticGradient, StochasticNeumann
from torchopt.linear_solve.warm_start import WarmStart

__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "LU",
    "MINRES",
    "QR",
    "Auto",
    "BiCGSTAB",
    "Cholesky",
    "Diagonal",
    "Jacobi",
    "Kronecker",
    "LinearOperator",
    "LinearSolveError",
    "LinearSolveWarning",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Solution",
    "Solver",
    "Stats",
    "Status",
    "StochasticGradient",
    "StochasticNeumann",
    "Tag",
    "Triangular",
    "WarmStart",
    "kronecker",
    "linear_solve",
    "solve_cg",
    "solve_inv",
    "solve_normal_cg",
]
