# SPDX-License-Identifier: Apache-2.0
# Written by tools/make_stubs.py; run it after a change instead of editing this file.
"""Differentiable optimization for PyTorch.

`import torchopt` imports this file and a table of names; the first use of a name imports what it
needs.
"""

from torchopt import (
    accelerated_op as accelerated_op,
    alias as alias,
    base as base,
    clip as clip,
    combine as combine,
    diff as diff,
    distributed as distributed,
    errors as errors,
    hook as hook,
    index as index,
    linalg as linalg,
    linear_solve as linear_solve,
    nn as nn,
    optim as optim,
    params as params,
    pytree as pytree,
    schedule as schedule,
    solvers as solvers,
    transform as transform,
    typing as typing,
    update as update,
    utils as utils,
    version as version,
    visual as visual,
)
from torchopt.accelerated_op import (
    is_available as accelerated_op_available,
)
from torchopt.alias import (
    adabelief as adabelief,
    adadelta as adadelta,
    adafactor as adafactor,
    adagrad as adagrad,
    adam as adam,
    adamax as adamax,
    adamw as adamw,
    adan as adan,
    adopt as adopt,
    amsgrad as amsgrad,
    amsgradw as amsgradw,
    asgd as asgd,
    lamb as lamb,
    lars as lars,
    lion as lion,
    muon as muon,
    nadam as nadam,
    nadamw as nadamw,
    radam as radam,
    rmsprop as rmsprop,
    rprop as rprop,
    schedule_free_adamw as schedule_free_adamw,
    schedule_free_sgd as schedule_free_sgd,
    sgd as sgd,
    shampoo as shampoo,
    sophia as sophia,
    yogi as yogi,
)
from torchopt.clip import (
    clip_grad_norm as clip_grad_norm,
)
from torchopt.combine import (
    chain as chain,
)
from torchopt.diff.explicit import (
    inner_loop as inner_loop,
)
from torchopt.hook import (
    register_hook as register_hook,
)
from torchopt.optim import (
    ADOPT as ADOPT,
    AMSGrad as AMSGrad,
    AMSGradW as AMSGradW,
    ASGD as ASGD,
    AdaBelief as AdaBelief,
    AdaDelta as AdaDelta,
    AdaGrad as AdaGrad,
    AdaMax as AdaMax,
    Adadelta as Adadelta,
    Adafactor as Adafactor,
    Adagrad as Adagrad,
    Adam as Adam,
    AdamW as AdamW,
    Adamax as Adamax,
    Adan as Adan,
    FuncOptimizer as FuncOptimizer,
    LAMB as LAMB,
    LARS as LARS,
    Lion as Lion,
    Muon as Muon,
    NAdam as NAdam,
    NAdamW as NAdamW,
    Optimizer as Optimizer,
    RAdam as RAdam,
    RMSProp as RMSProp,
    RMSprop as RMSprop,
    Rprop as Rprop,
    SGD as SGD,
    ScheduleFreeAdamW as ScheduleFreeAdamW,
    ScheduleFreeSGD as ScheduleFreeSGD,
    Shampoo as Shampoo,
    Sophia as Sophia,
    Yogi as Yogi,
)
from torchopt.optim.meta import (
    MetaADOPT as MetaADOPT,
    MetaAMSGrad as MetaAMSGrad,
    MetaAMSGradW as MetaAMSGradW,
    MetaASGD as MetaASGD,
    MetaAdaBelief as MetaAdaBelief,
    MetaAdaDelta as MetaAdaDelta,
    MetaAdaGrad as MetaAdaGrad,
    MetaAdaMax as MetaAdaMax,
    MetaAdadelta as MetaAdadelta,
    MetaAdafactor as MetaAdafactor,
    MetaAdagrad as MetaAdagrad,
    MetaAdam as MetaAdam,
    MetaAdamW as MetaAdamW,
    MetaAdamax as MetaAdamax,
    MetaAdan as MetaAdan,
    MetaLAMB as MetaLAMB,
    MetaLARS as MetaLARS,
    MetaLion as MetaLion,
    MetaMuon as MetaMuon,
    MetaNAdam as MetaNAdam,
    MetaNAdamW as MetaNAdamW,
    MetaOptimizer as MetaOptimizer,
    MetaRAdam as MetaRAdam,
    MetaRMSProp as MetaRMSProp,
    MetaRMSprop as MetaRMSprop,
    MetaRprop as MetaRprop,
    MetaSGD as MetaSGD,
    MetaScheduleFreeAdamW as MetaScheduleFreeAdamW,
    MetaScheduleFreeSGD as MetaScheduleFreeSGD,
    MetaShampoo as MetaShampoo,
    MetaSophia as MetaSophia,
    MetaYogi as MetaYogi,
)
from torchopt.transform import (
    nan_to_num as nan_to_num,
)
from torchopt.update import (
    apply_updates as apply_updates,
)
from torchopt.utils import (
    extract_state_dict as extract_state_dict,
    module_clone as module_clone,
    module_detach_ as module_detach_,
    recover_state_dict as recover_state_dict,
    stop_gradient as stop_gradient,
)
from torchopt.version import __version__ as __version__

__all__ = [
    'ADOPT', 'AMSGrad', 'AMSGradW', 'ASGD', 'AdaBelief', 'AdaDelta', 'AdaGrad', 'AdaMax',
    'Adadelta', 'Adafactor', 'Adagrad', 'Adam', 'AdamW', 'Adamax', 'Adan', 'FuncOptimizer', 'LAMB',
    'LARS', 'Lion', 'MetaADOPT', 'MetaAMSGrad', 'MetaAMSGradW', 'MetaASGD', 'MetaAdaBelief',
    'MetaAdaDelta', 'MetaAdaGrad', 'MetaAdaMax', 'MetaAdadelta', 'MetaAdafactor', 'MetaAdagrad',
    'MetaAdam', 'MetaAdamW', 'MetaAdamax', 'MetaAdan', 'MetaLAMB', 'MetaLARS', 'MetaLion',
    'MetaMuon', 'MetaNAdam', 'MetaNAdamW', 'MetaOptimizer', 'MetaRAdam', 'MetaRMSProp',
    'MetaRMSprop', 'MetaRprop', 'MetaSGD', 'MetaScheduleFreeAdamW', 'MetaScheduleFreeSGD',
    'MetaShampoo', 'MetaSophia', 'MetaYogi', 'Muon', 'NAdam', 'NAdamW', 'Optimizer', 'RAdam',
    'RMSProp', 'RMSprop', 'Rprop', 'SGD', 'ScheduleFreeAdamW', 'ScheduleFreeSGD', 'Shampoo',
    'Sophia', 'Yogi', 'accelerated_op_available', 'adabelief', 'adadelta', 'adafactor', 'adagrad',
    'adam', 'adamax', 'adamw', 'adan', 'adopt', 'amsgrad', 'amsgradw', 'apply_updates', 'asgd',
    'chain', 'clip_grad_norm', 'extract_state_dict', 'lamb', 'lars', 'lion', 'module_clone',
    'module_detach_', 'muon', 'nadam', 'nadamw', 'nan_to_num', 'radam', 'recover_state_dict',
    'register_hook', 'rmsprop', 'rprop', 'schedule_free_adamw', 'schedule_free_sgd', 'sgd',
    'shampoo', 'sophia', 'stop_gradient', 'yogi',
]
