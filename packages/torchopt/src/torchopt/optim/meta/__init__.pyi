# SPDX-License-Identifier: Apache-2.0
# Written by tools/make_stubs.py; run it after a change instead of editing this file.
"""Meta-optimizers, which step a module as part of the graph.

The classes are made from the functions in `torchopt.alias`, one for each line of `torchopt.index`.
"""

from collections.abc import Callable
from torch import Tensor, nn
from torchopt.typing import ScalarOrSchedule
from typing import Any

from torchopt.optim.meta.base import MetaOptimizer as MetaOptimizer

__all__ = [
    'MetaADOPT', 'MetaAMSGrad', 'MetaAMSGradW', 'MetaASGD', 'MetaAdEMAMix', 'MetaAdaBelief',
    'MetaAdaDelta', 'MetaAdaGrad', 'MetaAdaMax', 'MetaAdadelta', 'MetaAdafactor', 'MetaAdagrad',
    'MetaAdam', 'MetaAdamW', 'MetaAdamax', 'MetaAdan', 'MetaLAMB', 'MetaLARS', 'MetaLion',
    'MetaMARS', 'MetaMuon', 'MetaNAdam', 'MetaNAdamW', 'MetaOptimizer', 'MetaPSGD', 'MetaProdigy',
    'MetaRAdam', 'MetaRMSProp', 'MetaRMSprop', 'MetaRprop', 'MetaSGD', 'MetaSOAP',
    'MetaScheduleFreeAdamW', 'MetaScheduleFreeRAdam', 'MetaScheduleFreeSGD', 'MetaShampoo',
    'MetaSignum', 'MetaSophia', 'MetaYogi',
]

class MetaAdaBelief(MetaOptimizer):
    """AdaBelief as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-16, weight_decay: float = 0.0, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaAdaDelta(MetaOptimizer):
    """AdaDelta as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 1.0, rho: float = 0.9, eps: float = 1e-06,
        weight_decay: float = 0.0, *, moment_requires_grad: bool = True, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaAdafactor(MetaOptimizer):
    """Adafactor as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: float | Tensor = 0.01, beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 0.001), d: float = 1.0, weight_decay: float = 0.0,
        *, maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaAdaGrad(MetaOptimizer):
    """AdaGrad as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.01, lr_decay: float = 0.0,
        weight_decay: float = 0.0, initial_accumulator_value: float = 0.0, eps: float = 1e-10, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaAdam(MetaOptimizer):
    """Adam as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        eps_root: float = 0.0, moment_requires_grad: bool = True, maximize: bool = False,
        use_accelerated_op: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaAdaMax(MetaOptimizer):
    """AdaMax as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.002,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        moment_requires_grad: bool = True, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaAdamW(MetaOptimizer):
    """AdamW as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.01,
        *, eps_root: float = 0.0, mask: Any | Callable[[Any], Any] | None = None,
        moment_requires_grad: bool = False, maximize: bool = False,
        use_accelerated_op: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaAdan(MetaOptimizer):
    """Adan as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-08,
        weight_decay: float = 0.0, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaAdEMAMix(MetaOptimizer):
    """AdEMAMix as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), alpha: float = 5.0,
        eps: float = 1e-08, weight_decay: float = 0.0, warmup_steps: int = 0, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaADOPT(MetaOptimizer):
    """ADOPT as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.9999), eps: float = 1e-06, weight_decay: float = 0.0,
        *, maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaAMSGrad(MetaOptimizer):
    """AMSGrad as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaAMSGradW(MetaOptimizer):
    """AMSGradW as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.01,
        *, maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaASGD(MetaOptimizer):
    """ASGD as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: float | Tensor = 0.01, lambd: float = 0.0001,
        alpha: float = 0.75, t0: float = 1000000.0, weight_decay: float = 0.0, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaLAMB(MetaOptimizer):
    """LAMB as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-06, weight_decay: float = 0.0, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaLARS(MetaOptimizer):
    """LARS as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 1.0, momentum: float = 0.9,
        weight_decay: float = 0.0, trust_coefficient: float = 0.001, eps: float = 0.0, *,
        nesterov: bool = False, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaLion(MetaOptimizer):
    """Lion as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.0001,
        betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaMARS(MetaOptimizer):
    """MARS as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.003,
        betas: tuple[float, float] = (0.95, 0.99), gamma: float = 0.025, eps: float = 1e-08,
        weight_decay: float = 0.0, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaMuon(MetaOptimizer):
    """Muon as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001, momentum: float = 0.95,
        weight_decay: float = 0.1, nesterov: bool = True, ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315), eps: float = 1e-07,
        *, match_rms: bool = False, adamw_lr: ScalarOrSchedule | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999), adamw_eps: float = 1e-08,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaNAdam(MetaOptimizer):
    """NAdam as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.002,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        momentum_decay: float = 0.004, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaNAdamW(MetaOptimizer):
    """NAdamW as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.002,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.01,
        momentum_decay: float = 0.004, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaProdigy(MetaOptimizer):
    """Prodigy as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        d0: float = 1e-06, growth_rate: float | None = None, *, maximize: bool = False,
        first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaPSGD(MetaOptimizer):
    """PSGD as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001, momentum: float = 0.9,
        weight_decay: float = 0.0, precondition_lr: float = 0.1, initial_scale: float = 1.0,
        max_size: int = 1024, seed: int = 0, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaRAdam(MetaOptimizer):
    """RAdam as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.001,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0, *,
        moment_requires_grad: bool = True, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaRMSProp(MetaOptimizer):
    """RMSProp as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.01, alpha: float = 0.99,
        eps: float = 1e-08, weight_decay: float = 0.0, momentum: float = 0.0,
        centered: bool = False, *, initial_scale: float = 0.0, nesterov: bool = False,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaRprop(MetaOptimizer):
    """Rprop as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: float | Tensor = 0.01, etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50.0), *, maximize: bool = False,
        first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaScheduleFreeAdamW(MetaOptimizer):
    """ScheduleFreeAdamW as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        warmup_steps: int = 0, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaScheduleFreeRAdam(MetaOptimizer):
    """ScheduleFreeRAdam as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-08, weight_decay: float = 0.0,
        sgd_phase: bool = False, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaScheduleFreeSGD(MetaOptimizer):
    """ScheduleFreeSGD as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: float | Tensor = 1.0, beta: float = 0.9,
        weight_decay: float = 0.0, warmup_steps: int = 0, *, maximize: bool = False,
        first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaSGD(MetaOptimizer):
    """SGD as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule, momentum: float = 0.0,
        weight_decay: float = 0.0, dampening: float = 0.0, nesterov: bool = False,
        moment_requires_grad: bool = True, maximize: bool = False, *, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaShampoo(MetaOptimizer):
    """Shampoo as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.1, momentum: float = 0.0,
        weight_decay: float = 0.0, eps: float = 0.0001, decay: float = 1.0, update_every: int = 1,
        max_size: int = 1024, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaSignum(MetaOptimizer):
    """Signum as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.0001, momentum: float = 0.9,
        weight_decay: float = 0.0, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

class MetaSOAP(MetaOptimizer):
    """SOAP as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.003,
        betas: tuple[float, float] = (0.95, 0.95), eps: float = 1e-08, weight_decay: float = 0.0,
        shampoo_beta: float = 0.95, update_every: int = 10, max_size: int = 1024, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaSophia(MetaOptimizer):
    """Sophia as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.0001,
        betas: tuple[float, float] = (0.965, 0.99), rho: float = 0.04, weight_decay: float = 0.1,
        eps: float = 1e-15, batch_size: float = 1.0, update_every: int | None = 10, *,
        maximize: bool = False, first_order: bool = False, detach_every: int | None = None,
    ) -> None: ...

class MetaYogi(MetaOptimizer):
    """Yogi as part of the graph; see `MetaOptimizer`."""

    def __init__(
        self, module: nn.Module, lr: ScalarOrSchedule = 0.01,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 0.001, weight_decay: float = 0.0,
        initial_accumulator: float = 1e-06, *, maximize: bool = False, first_order: bool = False,
        detach_every: int | None = None,
    ) -> None: ...

MetaAdadelta = MetaAdaDelta
MetaAdagrad = MetaAdaGrad
MetaAdamax = MetaAdaMax
MetaRMSprop = MetaRMSProp
