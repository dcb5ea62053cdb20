# SPDX-License-Identifier: Apache-2.0
# Written by tools/make_stubs.py; run it after a change instead of editing this file.
"""Optimizers with the interface of torch.optim, and the functional and meta-optimizers.

The classes are made from the functions in `torchopt.alias`, one for each line of `torchopt.index`.
"""

from collections.abc import Callable, Iterable
from torch import Tensor
from torchopt.typing import ScalarOrSchedule
from typing import Any

from torchopt.optim.func import FuncOptimizer as FuncOptimizer
from torchopt.optim.base import Optimizer as Optimizer
from torchopt.optim.torch_optimizer import TorchOptimizer as TorchOptimizer

__all__ = [
    'ADOPT', 'AMSGrad', 'AMSGradW', 'ASGD', 'AdEMAMix', 'AdaBelief', 'AdaDelta', 'AdaGrad',
    'AdaMax', 'Adadelta', 'Adafactor', 'Adagrad', 'Adam', 'AdamW', 'Adamax', 'Adan',
    'FuncOptimizer', 'LAMB', 'LARS', 'Lion', 'MARS', 'Muon', 'NAdam', 'NAdamW', 'Optimizer', 'PSGD',
    'Prodigy', 'RAdam', 'RMSProp', 'RMSprop', 'Rprop', 'SGD', 'SOAP', 'ScheduleFreeAdamW',
    'ScheduleFreeRAdam', 'ScheduleFreeSGD', 'Shampoo', 'Signum', 'Sophia', 'TorchOptimizer', 'Yogi',
]

class AdaBelief(Optimizer):
    """AdaBelief with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-16, weight_decay: float = 0.0, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class AdaDelta(Optimizer):
    """AdaDelta with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 1.0, rho: float = 0.9,
        eps: float = 1e-06, weight_decay: float = 0.0, *, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class Adafactor(Optimizer):
    """Adafactor with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 0.01, beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 0.001), d: float = 1.0, weight_decay: float = 0.0,
        *, maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class AdaGrad(Optimizer):
    """AdaGrad with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.01, lr_decay: float = 0.0,
        weight_decay: float = 0.0, initial_accumulator_value: float = 0.0, eps: float = 1e-10, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class Adam(Optimizer):
    """Adam with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        eps_root: float = 0.0, maximize: bool = False, use_accelerated_op: bool = False,
        compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class AdaMax(Optimizer):
    """AdaMax with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.002,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class AdamW(Optimizer):
    """AdamW with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.01,
        *, eps_root: float = 0.0, mask: Any | Callable[[Any], Any] | None = None,
        maximize: bool = False, use_accelerated_op: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class Adan(Optimizer):
    """Adan with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-08,
        weight_decay: float = 0.0, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class AdEMAMix(Optimizer):
    """AdEMAMix with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), alpha: float = 5.0,
        eps: float = 1e-08, weight_decay: float = 0.0, warmup_steps: int = 0, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class ADOPT(Optimizer):
    """ADOPT with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.9999), eps: float = 1e-06, weight_decay: float = 0.0,
        *, maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class AMSGrad(Optimizer):
    """AMSGrad with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class AMSGradW(Optimizer):
    """AMSGradW with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.01,
        *, maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class ASGD(Optimizer):
    """ASGD with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 0.01, lambd: float = 0.0001,
        alpha: float = 0.75, t0: float = 1000000.0, weight_decay: float = 0.0, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class LAMB(Optimizer):
    """LAMB with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-06, weight_decay: float = 0.0, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class LARS(Optimizer):
    """LARS with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 1.0, momentum: float = 0.9,
        weight_decay: float = 0.0, trust_coefficient: float = 0.001, eps: float = 0.0, *,
        nesterov: bool = False, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class Lion(Optimizer):
    """Lion with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.0001,
        betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class MARS(Optimizer):
    """MARS with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.003,
        betas: tuple[float, float] = (0.95, 0.99), gamma: float = 0.025, eps: float = 1e-08,
        weight_decay: float = 0.0, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class Muon(Optimizer):
    """Muon with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001, momentum: float = 0.95,
        weight_decay: float = 0.1, nesterov: bool = True, ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315), eps: float = 1e-07,
        *, match_rms: bool = False, adamw_lr: ScalarOrSchedule | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999), adamw_eps: float = 1e-08,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class NAdam(Optimizer):
    """NAdam with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.002,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        momentum_decay: float = 0.004, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class NAdamW(Optimizer):
    """NAdamW with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.002,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.01,
        momentum_decay: float = 0.004, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class Prodigy(Optimizer):
    """Prodigy with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        d0: float = 1e-06, growth_rate: float | None = None, *, maximize: bool = False,
        compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class PSGD(Optimizer):
    """PSGD with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001, momentum: float = 0.9,
        weight_decay: float = 0.0, precondition_lr: float = 0.1, initial_scale: float = 1.0,
        max_size: int = 1024, seed: int = 0, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class RAdam(Optimizer):
    """RAdam with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class RMSProp(Optimizer):
    """RMSProp with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.01, alpha: float = 0.99,
        eps: float = 1e-08, weight_decay: float = 0.0, momentum: float = 0.0,
        centered: bool = False, *, initial_scale: float = 0.0, nesterov: bool = False,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class Rprop(Optimizer):
    """Rprop with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 0.01,
        etas: tuple[float, float] = (0.5, 1.2), step_sizes: tuple[float, float] = (1e-06, 50.0), *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class ScheduleFreeAdamW(Optimizer):
    """ScheduleFreeAdamW with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        warmup_steps: int = 0, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class ScheduleFreeRAdam(Optimizer):
    """ScheduleFreeRAdam with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        sgd_phase: bool = False, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class ScheduleFreeSGD(Optimizer):
    """ScheduleFreeSGD with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 1.0, beta: float = 0.9,
        weight_decay: float = 0.0, warmup_steps: int = 0, *, maximize: bool = False,
        compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class SGD(Optimizer):
    """SGD with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule, momentum: float = 0.0,
        weight_decay: float = 0.0, dampening: float = 0.0, nesterov: bool = False,
        maximize: bool = False, *, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class Shampoo(Optimizer):
    """Shampoo with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.1, momentum: float = 0.0,
        weight_decay: float = 0.0, eps: float = 0.0001, decay: float = 1.0, update_every: int = 1,
        max_size: int = 1024, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class Signum(Optimizer):
    """Signum with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.0001, momentum: float = 0.9,
        weight_decay: float = 0.0, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

class SOAP(Optimizer):
    """SOAP with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.003,
        betas: tuple[float, float] = (0.95, 0.95), eps: float = 1e-08, weight_decay: float = 0.0,
        shampoo_beta: float = 0.95, update_every: int = 10, max_size: int = 1024, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class Sophia(Optimizer):
    """Sophia with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.0001,
        betas: tuple[float, float] = (0.965, 0.99), rho: float = 0.04, weight_decay: float = 0.1,
        eps: float = 1e-15, batch_size: float = 1.0, update_every: int | None = 10, *,
        maximize: bool = False, compensated: bool = False, in_8_bits: bool = False,
    ) -> None: ...

class Yogi(Optimizer):
    """Yogi with the interface of torch.optim; see `Optimizer`."""

    def __init__(
        self, params: Iterable[Tensor], lr: ScalarOrSchedule = 0.01,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 0.001, weight_decay: float = 0.0,
        initial_accumulator: float = 1e-06, *, maximize: bool = False, compensated: bool = False,
        in_8_bits: bool = False,
    ) -> None: ...

Adadelta = AdaDelta
Adagrad = AdaGrad
Adamax = AdaMax
RMSprop = RMSProp
