# SPDX-License-Identifier: Apache-2.0
"""All uses of torch's private names, behind one function for each purpose."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.torch_internals import (
    backward,
    checkpoints,
    compiling,
    lists,
    packing,
    process_groups,
    splitting,
    tracing,
    transforms,
    wrong_kernels,
)
from torchopt.torch_internals.backward import *  # noqa: F403
from torchopt.torch_internals.checkpoints import *  # noqa: F403
from torchopt.torch_internals.compiling import *  # noqa: F403
from torchopt.torch_internals.lists import *  # noqa: F403
from torchopt.torch_internals.packing import *  # noqa: F403
from torchopt.torch_internals.process_groups import *  # noqa: F403
from torchopt.torch_internals.splitting import *  # noqa: F403
from torchopt.torch_internals.tracing import *  # noqa: F403
from torchopt.torch_internals.transforms import *  # noqa: F403
from torchopt.torch_internals.wrong_kernels import *  # noqa: F403

__all__ = ["FakeTensor", "TorchDispatchMode"]
__all__ += backward.__all__
__all__ += checkpoints.__all__
__all__ += compiling.__all__
__all__ += lists.__all__
__all__ += packing.__all__
__all__ += process_groups.__all__
__all__ += splitting.__all__
__all__ += tracing.__all__
__all__ += transforms.__all__
__all__ += wrong_kernels.__all__
