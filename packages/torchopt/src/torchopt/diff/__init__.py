# SPDX-License-Identifier: Apache-2.0
"""Three ways to differentiate through a computation: explicit, implicit and zero-order.

`Explicit`, `Implicit` and `ZeroOrder` take the same inner problem and have the same signature;
`Verify` checks one of them against another.
"""

from __future__ import annotations

from torchopt.diff import explicit, implicit, zero_order
from torchopt.diff.differences import Differences
from torchopt.diff.engine import Engine
from torchopt.diff.explicit import Explicit, InnerResult, inner_loop
from torchopt.diff.implicit import Implicit, ImplicitMetaGradientModule
from torchopt.diff.verify import Verification, Verify, VerifyReport
from torchopt.diff.zero_order.engine import ZeroOrder
from torchopt.diff.zero_order.nn import ZeroOrderGradientModule

__all__ = [
    "Differences",
    "Engine",
    "Explicit",
    "Implicit",
    "ImplicitMetaGradientModule",
    "InnerResult",
    "Verification",
    "Verify",
    "VerifyReport",
    "ZeroOrder",
    "ZeroOrderGradientModule",
    "explicit",
    "implicit",
    "inner_loop",
    "zero_order",
]
