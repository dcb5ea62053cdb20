# SPDX-License-Identifier: Apache-2.0
# Written by tools/make_stubs.py; run it after a change instead of editing this file.
"""Transformations from gradients to updates, one per file.
"""

from torchopt.transform import utils as utils
from torchopt.optimizers.adabelief import (
    ScaleByBeliefState as ScaleByBeliefState,
    scale_by_belief as scale_by_belief,
)
from torchopt.optimizers.adafactor import (
    ScaleByFactoredRmsState as ScaleByFactoredRmsState,
    scale_by_factored_rms as scale_by_factored_rms,
)
from torchopt.optimizers.adan import (
    ScaleByAdanState as ScaleByAdanState,
    scale_by_adan as scale_by_adan,
)
from torchopt.optimizers.ademamix import (
    ScaleByAdemamixState as ScaleByAdemamixState,
    scale_by_ademamix as scale_by_ademamix,
)
from torchopt.optimizers.adopt import (
    ScaleByAdoptState as ScaleByAdoptState,
    scale_by_adopt as scale_by_adopt,
)
from torchopt.optimizers.amsgrad import (
    ScaleByAmsgradState as ScaleByAmsgradState,
    scale_by_amsgrad as scale_by_amsgrad,
)
from torchopt.optimizers.asgd import (
    ScaleByAsgdState as ScaleByAsgdState,
    scale_by_asgd as scale_by_asgd,
)
from torchopt.optimizers.lion import (
    ScaleByLionState as ScaleByLionState,
    scale_by_lion as scale_by_lion,
)
from torchopt.optimizers.mars import (
    ScaleByMarsState as ScaleByMarsState,
    scale_by_mars as scale_by_mars,
)
from torchopt.optimizers.nadam import (
    ScaleByNadamState as ScaleByNadamState,
    scale_by_nadam as scale_by_nadam,
)
from torchopt.optimizers.prodigy import (
    ScaleByProdigyState as ScaleByProdigyState,
    scale_by_prodigy as scale_by_prodigy,
)
from torchopt.optimizers.psgd import (
    ScaleByPsgdState as ScaleByPsgdState,
    scale_by_psgd as scale_by_psgd,
)
from torchopt.optimizers.rprop import (
    ScaleByRpropState as ScaleByRpropState,
    scale_by_rprop as scale_by_rprop,
)
from torchopt.optimizers.schedule_free import (
    ScheduleFreeState as ScheduleFreeState,
    averaged_params as averaged_params,
    schedule_free as schedule_free,
)
from torchopt.optimizers.schedule_free_radam import ScheduleFreeRadamState as ScheduleFreeRadamState
from torchopt.optimizers.shampoo import (
    ScaleByShampooState as ScaleByShampooState,
    scale_by_shampoo as scale_by_shampoo,
)
from torchopt.optimizers.soap import (
    ScaleBySoapState as ScaleBySoapState,
    scale_by_soap as scale_by_soap,
)
from torchopt.optimizers.sophia import (
    ScaleBySophiaState as ScaleBySophiaState,
    observe_curvature as observe_curvature,
    scale_by_sophia as scale_by_sophia,
)
from torchopt.optimizers.yogi import (
    ScaleByYogiState as ScaleByYogiState,
    scale_by_yogi as scale_by_yogi,
)
from torchopt.transform.accumulate import (
    AccumulateState as AccumulateState,
    accumulate as accumulate,
)
from torchopt.transform.add_decayed_weights import add_decayed_weights as add_decayed_weights
from torchopt.transform.add_noise import AddNoiseState as AddNoiseState, add_noise as add_noise
from torchopt.transform.apply_if_finite import (
    ApplyIfFiniteState as ApplyIfFiniteState,
    apply_if_finite as apply_if_finite,
)
from torchopt.transform.cautious import cautious as cautious
from torchopt.transform.centralize import centralize as centralize
from torchopt.transform.compensated import (
    CompensatedState as CompensatedState,
    compensated as compensated,
)
from torchopt.transform.ema import EmaState as EmaState, ema as ema
from torchopt.transform.freeze import freeze as freeze
from torchopt.transform.galore import GaloreState as GaloreState, galore as galore
from torchopt.transform.in_8_bits import Quantized as Quantized, in_8_bits as in_8_bits
from torchopt.transform.in_precision import in_precision as in_precision
from torchopt.transform.inject_hyperparams import (
    InjectHyperparamsState as InjectHyperparamsState,
    inject_hyperparams as inject_hyperparams,
)
from torchopt.transform.lookahead import LookaheadState as LookaheadState, lookahead as lookahead
from torchopt.transform.masked import (
    MaskedNode as MaskedNode,
    MaskedState as MaskedState,
    masked as masked,
)
from torchopt.transform.nan_to_num import nan_to_num as nan_to_num
from torchopt.transform.orthogonalize import orthogonalize as orthogonalize
from torchopt.transform.partition import PartitionState as PartitionState, partition as partition
from torchopt.transform.sam import SamState as SamState, sam as sam
from torchopt.transform.scale import scale as scale
from torchopt.transform.scale_by_adadelta import (
    ScaleByAdadeltaState as ScaleByAdadeltaState,
    scale_by_adadelta as scale_by_adadelta,
)
from torchopt.transform.scale_by_adam import (
    ScaleByAdamState as ScaleByAdamState,
    scale_by_accelerated_adam as scale_by_accelerated_adam,
    scale_by_adam as scale_by_adam,
)
from torchopt.transform.scale_by_adamax import (
    ScaleByAdamaxState as ScaleByAdamaxState,
    scale_by_adamax as scale_by_adamax,
)
from torchopt.transform.scale_by_radam import (
    ScaleByRAdamState as ScaleByRAdamState,
    scale_by_radam as scale_by_radam,
)
from torchopt.transform.scale_by_rms import (
    ScaleByRmsState as ScaleByRmsState,
    scale_by_rms as scale_by_rms,
)
from torchopt.transform.scale_by_rss import (
    ScaleByRssState as ScaleByRssState,
    scale_by_rss as scale_by_rss,
)
from torchopt.transform.scale_by_schedule import (
    ScaleByScheduleState as ScaleByScheduleState,
    scale_by_schedule as scale_by_schedule,
)
from torchopt.transform.scale_by_stddev import (
    ScaleByRStdDevState as ScaleByRStdDevState,
    scale_by_stddev as scale_by_stddev,
)
from torchopt.transform.scale_by_trust_ratio import scale_by_trust_ratio as scale_by_trust_ratio
from torchopt.transform.trace import (
    DampenedTraceState as DampenedTraceState,
    TraceState as TraceState,
    trace as trace,
)

__all__ = [
    'accumulate', 'add_decayed_weights', 'add_noise', 'apply_if_finite', 'averaged_params',
    'cautious', 'centralize', 'compensated', 'ema', 'freeze', 'galore', 'in_8_bits', 'in_precision',
    'inject_hyperparams', 'lookahead', 'masked', 'nan_to_num', 'observe_curvature', 'orthogonalize',
    'partition', 'sam', 'scale', 'scale_by_accelerated_adam', 'scale_by_adadelta', 'scale_by_adam',
    'scale_by_adamax', 'scale_by_adan', 'scale_by_ademamix', 'scale_by_adopt', 'scale_by_amsgrad',
    'scale_by_asgd', 'scale_by_belief', 'scale_by_factored_rms', 'scale_by_lion', 'scale_by_mars',
    'scale_by_nadam', 'scale_by_prodigy', 'scale_by_psgd', 'scale_by_radam', 'scale_by_rms',
    'scale_by_rprop', 'scale_by_rss', 'scale_by_schedule', 'scale_by_shampoo', 'scale_by_soap',
    'scale_by_sophia', 'scale_by_stddev', 'scale_by_trust_ratio', 'scale_by_yogi', 'schedule_free',
    'trace',
]
