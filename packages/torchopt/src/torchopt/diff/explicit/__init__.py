# SPDX-License-Identifier: Apache-2.0
"""The explicit engine: inner loops that are differentiated through their steps.

A call of a loop becomes a `Call`, for which `dispatch` chooses a run.

| module | contents |
|---|---|
| `loop` | `inner_loop`, `Explicit` and `InnerResult` |
| `options`, `checks` | checks of settings and of arguments |
| `call`, `stepper` | the arguments of one call; the optimizer and what it reaches |
| `dispatch` | the choice of a run |
| `step` | one step: start, loss with gradient, update |
| `adjoint`, `dual`, `variables` | the derivative of a step, and what it is taken by |
| `tasks` | a batch of tasks as one program |
| `unrolled` | the run that keeps everything |
| `run`, `tail` | a run that keeps some states; its last steps, which keep their graph |
| `schedule`, `moments`, `host` | which states are kept, and where |
| `budget`, `memory` | how many states fit into a number of bytes |
| `forward` | a run that carries tangents |
| `reversible`, `fixed_point` | a run whose steps are undone |
| `trail` | another derivative of a recorded run |
| `blocks`, `block` | blocks of a model that are computed again |
| `compiled_block`, `block_code`, `products` | the same by compiled programs |
| `traced`, `traced_forward`, `straight` | runs of traced programs |
| `traced_start`, `whole` | the programs of the start, and of steps with their adjoint |
| `trace`, `program`, `evaluation` | programs, traced once and cached |
| `fingerprint`, `reached`, `plan` | what programs depend on besides their arguments |
| `forms`, `taken`, `packing` | the arguments of programs, as flat lists |
| `given`, `repeated` | calls that differ from an earlier one only in values |
"""

from __future__ import annotations

from torchopt.diff.explicit.loop import Explicit, InnerResult, inner_loop

__all__ = ["Explicit", "InnerResult", "inner_loop"]
