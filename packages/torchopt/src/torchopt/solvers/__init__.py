# SPDX-License-Identifier: Apache-2.0
"""Solvers with differentiable solutions: minima, roots, fixed points, small QPs."""

from __future__ import annotations

from torchopt.solvers.base import Solver, SolverError, SolveResult, SolverWarning, SolveStatus
from torchopt.solvers.bisection import Bisection
from torchopt.solvers.fixed_point import Anderson, Broyden, FixedPointIteration
from torchopt.solvers.gauss_newton import Dogleg, GaussNewton, LevenbergMarquardt
from torchopt.solvers.gradient_descent import GradientDescent
from torchopt.solvers.kinds import FixedPointSolver, Minimizer, RootSolver
from torchopt.solvers.lbfgs import LBFGS
from torchopt.solvers.least_squares import LeastSquares
from torchopt.solvers.newton_cg import Newton, NewtonCG
from torchopt.solvers.projection import (
    project_box,
    project_l1_ball,
    project_l2_ball,
    project_non_negative,
    project_simplex,
)
from torchopt.solvers.prox import prox_elastic_net, prox_group_lasso, prox_l1, prox_l2_squared
from torchopt.solvers.proximal_gradient import ProjectedGradient, ProximalGradient
from torchopt.solvers.quadratic_program import QPSolution, quadratic_program

__all__ = [
    "LBFGS",
    "Anderson",
    "Bisection",
    "Broyden",
    "Dogleg",
    "FixedPointIteration",
    "FixedPointSolver",
    "GaussNewton",
    "GradientDescent",
    "LeastSquares",
    "LevenbergMarquardt",
    "Minimizer",
    "Newton",
    "NewtonCG",
    "ProjectedGradient",
    "ProximalGradient",
    "QPSolution",
    "RootSolver",
    "SolveResult",
    "SolveStatus",
    "Solver",
    "SolverError",
    "SolverWarning",
    "project_box",
    "project_l1_ball",
    "project_l2_ball",
    "project_non_negative",
    "project_simplex",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "prox_l2_squared",
    "quadratic_program",
]
