# SPDX-License-Identifier: Apache-2.0
"""Classical problems of nonlinear least squares: residuals, standard start, known minima.

Moré, Garbow, Hillstrom, Testing unconstrained optimization software, 1981; the minima are those of
the sum of squares in the paper. Local minima that methods reach are listed too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PROBLEMS", "Problem"]


class Problem(NamedTuple):
    """A problem.

    Attributes:
        residuals: The map x -> r.
        start: The standard start.
        minima: Known minima of the sum of squares.
    """

    residuals: Callable[[Tensor], Tensor]
    start: list[float]
    minima: tuple[float, ...]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def count(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: Tensor) -> Tensor:
    first = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
    return torch.stack([first, -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Tensor) -> Tensor:
    return f64(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** count(3))


def jennrich_sampson(x: Tensor) -> Tensor:
    i = count(10)
    return 2 + 2 * i - torch.exp(i * x[0]) - torch.exp(i * x[1])


def helical_valley(x: Tensor) -> Tensor:
    turn = torch.atan2(x[1], x[0]) / (2 * torch.pi)
    radius = torch.sqrt(x[0] ** 2 + x[1] ** 2)
    return torch.stack([10 * (x[2] - 10 * turn), 10 * (radius - 1), x[2]])


BARD = f64(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


def bard(x: Tensor) -> Tensor:
    u = count(15)
    v = 16 - u
    return BARD - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


MEYER = f64(
    *(34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744),
    *(8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872),
)


def meyer(x: Tensor) -> Tensor:
    return x[0] * torch.exp(x[1] / (45 + 5 * count(16) + x[2])) - MEYER


def box_three_dimensional(x: Tensor) -> Tensor:
    t = 0.1 * count(10)
    data = torch.exp(-t) - torch.exp(-10 * t)
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * data


def powell_singular(x: Tensor) -> Tensor:
    linear = [x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3])]
    return torch.stack([*linear, (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def wood(x: Tensor) -> Tensor:
    valleys = [10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2), 1 - x[2]]
    return torch.stack([*valleys, 10**0.5 * (x[1] + x[3] - 2), 10**-0.5 * (x[1] - x[3])])


KOWALIK_Y = f64(
    0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246
)
KOWALIK_U = f64(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def kowalik_osborne(x: Tensor) -> Tensor:
    u = KOWALIK_U
    return KOWALIK_Y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:
    t = count(20) / 5
    rise = x[0] + t * x[1] - torch.exp(t)
    return rise**2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


OSBORNE = f64(
    *(0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751),
    *(0.718, 0.685, 0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490),
    *(0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406),
)


def osborne_1(x: Tensor) -> Tensor:
    t = 10 * (count(33) - 1)
    return OSBORNE - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


PROBLEMS = {
    "rosenbrock": Problem(rosenbrock, [-1.2, 1.0], (0.0,)),
    "freudenstein_roth": Problem(freudenstein_roth, [0.5, -2.0], (0.0, 48.9842)),
    "powell_badly_scaled": Problem(powell_badly_scaled, [0.0, 1.0], (0.0,)),
    "brown_badly_scaled": Problem(brown_badly_scaled, [1.0, 1.0], (0.0,)),
    "beale": Problem(beale, [1.0, 1.0], (0.0,)),
    "jennrich_sampson": Problem(jennrich_sampson, [0.3, 0.4], (124.362,)),
    "helical_valley": Problem(helical_valley, [-1.0, 0.0, 0.0], (0.0,)),
    "bard": Problem(bard, [1.0, 1.0, 1.0], (8.21487e-3,)),
    "meyer": Problem(meyer, [0.02, 4000.0, 250.0], (87.9458,)),
    "box_three_dimensional": Problem(box_three_dimensional, [0.0, 10.0, 20.0], (0.0,)),
    "powell_singular": Problem(powell_singular, [3.0, -1.0, 0.0, 1.0], (0.0,)),
    "wood": Problem(wood, [-3.0, -1.0, -3.0, -1.0], (0.0,)),
    "kowalik_osborne": Problem(kowalik_osborne, [0.25, 0.39, 0.415, 0.39], (3.07505e-4,)),
    "brown_dennis": Problem(brown_dennis, [25.0, 5.0, -5.0, -1.0], (85822.2,)),
    "osborne_1": Problem(osborne_1, [0.5, 1.5, -1.0, 0.01, 0.02], (5.46489e-5,)),
}
