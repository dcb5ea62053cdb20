# SPDX-License-Identifier: Apache-2.0
"""The explicit engine: an inner loop that is differentiated through its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchopt.base import require_transformation
from torchopt.diff.differences import Differences, Judge
from torchopt.diff.engine import Engine
from torchopt.diff.explicit.blocks import find_blocks
from torchopt.diff.explicit.call import Call, make_inputs
from torchopt.diff.explicit.checks import batches_of, explain_arguments, require_count
from torchopt.diff.explicit.dispatch import run_call
from torchopt.diff.explicit.given import Given
from torchopt.diff.explicit.options import TRACED, require_options
from torchopt.diff.explicit.repeated import Repetitions
from torchopt.diff.explicit.stepper import Memory
from torchopt.diff.explicit.tasks import task_count
from torchopt.diff.explicit.trail import FOLLOWING
from torchopt.diff.problem import require_verify
from torchopt.diff.sealed import EXCHANGED, are_plain, is_sealed_without
from torchopt.diff.verify import Verify, VerifyReport, checked
from torchopt.tree import tree_unflatten

__all__ = ["Explicit", "InnerResult", "inner_loop"]


class InnerResult(NamedTuple):
    """The result of an inner loop.

    Attributes:
        params: Tree like the initial parameters; with `tasks`, each leaf `[tasks, ...]`.
        state: The optimizer's state, for `state=` of a call that continues from here.
        losses: The losses before each step, `[steps]`; with `tasks`, `[tasks, steps]`.
        aux: What the loss returned besides its value, a tree with the leaves of all steps stacked
            like `losses`; None if it returned nothing else.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import InnerResult, inner_loop
        >>> inner = inner_loop(lambda w, x: ((w - x) ** 2).sum(), torchopt.sgd(0.5), steps=2)
        >>> result = inner(torch.zeros(1), torch.ones(1))
        >>> isinstance(result, InnerResult), result.losses
        (True, tensor([1., 0.]))
    """

    params: Any
    state: Any
    losses: Tensor
    aux: Any


@dataclass(frozen=True)
class Explicit(Engine):
    """An inner loop and how it is differentiated; see `torchopt.inner_loop` for the fields.

    Without loss, optimizer and steps it is an engine without a problem: see `over`.

    Attributes:
        report: The results of `verify`, and the estimated errors of `"differences"`.

    Raises:
        TypeError: A field has a wrong type.
        ValueError: A field is out of its range, or fields exclude each other.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import Explicit
        >>> engine = Explicit(derivative="mixed", keep="steps")
        >>> inner = engine.over(lambda w, x: ((w - x) ** 2).sum(), torchopt.sgd(0.25), steps=2)
        >>> x = torch.ones(1, requires_grad=True)
        >>> torch.autograd.grad(inner(torch.zeros(1), x).params.sum(), x)
        (tensor([0.7500]),)
    """

    loss: Any = None
    optimizer: Any = None
    steps: int = 1
    derivative: str | Differences = "reverse"
    keep: int | str = "all"
    window: int | None = None
    tasks: Sequence[Any] | None = None
    verify: Verify | None = None
    blocks: Sequence[str] | None = None
    execute: str = "eager"
    keep_on: str = "device"
    unroll: int = 1
    report: VerifyReport = field(
        init=False, default_factory=VerifyReport, repr=False, compare=False
    )
    _memory: Memory = field(init=False, default_factory=Memory, repr=False, compare=False)
    _repetitions: Repetitions = field(
        init=False, default_factory=Repetitions, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.loss is not None or self.optimizer is not None:
            self._check_problem()
        require_options(self)
        require_verify(self.verify, Verify)

    def _check_problem(self) -> None:
        if not callable(self.loss):
            raise TypeError(
                "inner_loop: loss: expected a function of (params, batch, *meta), got "
                f"{type(self.loss).__name__}."
            )
        require_count(self.steps, "steps")
        is_class = isinstance(self.optimizer, type) and hasattr(self.optimizer, "step")
        if is_class or not callable(self.optimizer):
            require_transformation(self.optimizer, "inner_loop: optimizer")

    @property
    def _differences(self) -> Differences | None:
        if isinstance(self.derivative, Differences):
            return self.derivative
        return Differences() if self.derivative == "differences" else None

    def __call__(
        self,
        params: Any,
        batch: Any = None,
        *meta: Any,
        batches: Any = None,
        state: Any = None,
        **hypers: Any,
    ) -> InnerResult:
        """Run the loop.

        Args:
            params: The initial parameters, a tree of tensors.
            batch: The batch of every step; None with `batches`.
            *meta: Further arguments of the loss.
            batches: A batch for each step: a tree with a leading dimension of steps, or a sequence
                of trees.
            state: The optimizer's state to start from; None makes one.
            **hypers: Hyper-parameters for the constructor of the optimizer.

        Raises:
            NotDifferentiableError: The loss uses a tensor that requires a gradient and is not an
                argument, or does not depend on the parameters.
            TypeError: An argument has a wrong type.
            ValueError: The number of batches is not the number of steps, or tensors differ in the
                number of tasks.
        """
        try:
            found: InnerResult = checked(
                self, (params, batch, *meta), {"batches": batches, "state": state, **hypers}
            )
        except TypeError as error:
            if callable(self.loss):
                explain_arguments(self.loss, 2 + len(meta), error)
            raise
        return found

    @property
    def follows(self) -> bool:
        """Whether the engine differentiates a run that another one over its problem recorded."""
        eager = self.execute == "eager" and self.keep == "all" and self.keep_on == "device"
        return eager and (self._differences is not None or self.derivative in FOLLOWING)

    def record_in(self, trail: list[Any]) -> None:
        """Add a record of the next run to a list, or use the record of the same run in it."""
        self._memory.trail = trail

    def run_inner(
        self,
        params: Any,
        batch: Any = None,
        *meta: Any,
        batches: Any = None,
        state: Any = None,
        **hypers: Any,
    ) -> InnerResult:
        """Run the loop without the checks of `verify`."""
        given, known = None, None
        if self.execute in TRACED and batches is None and state is None:
            given = Given.of((params, batch, *meta), hypers)
            known = given and self._repetitions.find(given, self._memory, self.loss)
            if given and known and known.is_direct:
                return InnerResult(*known.result(given.tensors))
        repeatable = given and known is None and given.forms is not None
        repeats: list[Any] | None = [] if repeatable else None
        call = self._call(params, batch, meta, batches, state, hypers, repeats)
        form, outputs = call.params.spec, run_call(call, self.keep, self.execute, self.unroll)
        if given and repeats:
            self._repetitions.note(given, call, self._memory)
        carry = outputs.carry
        return InnerResult(
            tree_unflatten(form, carry.params),
            tree_unflatten(carry.state_spec, carry.state),
            outputs.losses,
            outputs.aux_tree(),
        )

    def _call(
        self,
        params: Any,
        batch: Any,
        meta: tuple[Any, ...],
        batches: Any,
        state: Any,
        hypers: dict[str, Any],
        repeats: list[Any] | None,
    ) -> Call:
        stepper = self._memory.stepper(self.optimizer, hypers)
        each, by_step = batches_of(batch, batches, self.steps)
        dims = (None,) * (2 + len(meta)) if self.tasks is None else tuple(self.tasks)
        if len(dims) != 2 + len(meta):
            raise ValueError(
                "inner_loop: tasks: expected a dimension, or None, for params, batch and each "
                f"further argument ({2 + len(meta)}), got {len(dims)}."
            )
        inputs, fields = make_inputs(stepper, params, state, each, meta, dims, by_step=by_step)
        first = 0 if self.window is None else max(0, self.steps - self.window)
        differences = self._differences
        return Call(
            loss=self.loss,
            optimizer=stepper.optimizer,
            reach=functools.partial(self._memory.reach, self.loss, stepper),
            sizes=self._memory.sizes,
            known_blocks=self._memory.known_blocks,
            derivative="differences" if differences else self.derivative,  # type: ignore[arg-type]
            steps=self.steps,
            first=first,
            tasks=None if self.tasks is None else task_count(inputs, fields),
            inputs=tuple(inputs.tensors),
            dims=tuple(inputs.dims),
            blocks=self._blocks(),
            compiled_blocks=self.execute == "blocks",
            host=self.keep_on == "host",
            judge=None if differences is None else Judge(differences, self.report),
            trail=self._memory.trail,
            repeats=repeats,
            plain=are_plain(params, batch, batches, meta) and self._is_sealed(),
            **fields,
        )

    def _is_sealed(self) -> bool:
        """Return whether the loss is known to depend only on its arguments."""
        if self.execute not in TRACED:
            return is_sealed_without(self.loss, EXCHANGED)
        return self._memory.is_sealed(self.loss)  # a program is of what the loss reaches anyway

    def _blocks(self) -> tuple[nn.Module, ...]:
        if self.derivative != "mixed":
            return ()
        found = tuple(find_blocks(self.loss, self.blocks))
        if self.execute == "blocks" and not found:
            raise ValueError(
                'inner_loop: execute: expected a loss that calls equal blocks for "blocks", such '
                "as the members of an nn.ModuleList, found none; name them, as in "
                'blocks=["layers.0"], or use execute="eager".'
            )
        return found


def inner_loop(
    loss: Callable[..., Any],
    optimizer: Any,
    *,
    steps: int,
    derivative: str | Differences = "reverse",
    keep: int | str = "all",
    window: int | None = None,
    tasks: Sequence[Any] | None = None,
    verify: Verify | None = None,
    blocks: Sequence[str] | None = None,
    keep_on: str = "device",
    execute: str = "eager",
    unroll: int = 1,
    compile: bool = False,  # noqa: A002 - the word of the field
) -> Explicit:
    """Return an inner loop that is differentiated through its steps.

    To run the loop, call it with the initial parameters and the other arguments of the loss. The
    result can be differentiated with respect to the initial parameters, all floating-point tensors
    of the batch and of the further arguments, and all hyper-parameters that are tensors. Unless the
    text below says otherwise, all settings give the gradient of the unrolled loop and differ
    only in memory and time.

    Args:
        loss: `loss(params, batch, *meta)`: a 0-dim tensor, or such a tensor and a tree of anything
            else. A module is called by `torchopt.params.functional_call(module, params, batch)`.
        optimizer: A constructor, such as `torchopt.adam`, whose hyper-parameters are then keywords
            of the call, or a transformation.
        steps: Number of steps, >= 1.
        derivative: How a step is differentiated. `"reverse"`: reverse over reverse mode.
            `"mixed"`: forward over reverse mode, which needs the memory of a first derivative.
            `"differences"`, or a `torchopt.diff.Differences`: products with second derivatives are
            computed from four, or two, gradients, for losses whose operations have no second
            derivative; `report.differences` has the estimated error, and a large one raises.
            `"first_order"`: the gradient of the loss is treated as a constant; no second
            derivatives are needed, and the result is a different derivative. `"forward"`: tangents
            are carried along for each scalar that is differentiated: memory does not depend on
            `steps`, time is proportional to the number of scalars.
        keep: What is kept of the run. `"all"`: everything (`"mixed"`: states and gradients).
            `"steps"`: the states; the backward pass computes each step again, once. In reverse mode
            the last step keeps its graph, and so do steps before it that fit into 4 MiB with it.
            Earlier steps are differentiated several at once, as many as fit into 2 MiB. A trial
            step in the first call measures their size. An int: this many states, with as few
            recomputed steps as possible, by binomial checkpointing; from 32 on, several steps are
            differentiated at once as with `"steps"`. A string such as `"64MiB"`: as many states as
            fit into this budget besides one step, whose memory a trial step measures. `"forward"`
            keeps no states, so only a budget matters: if the tangents do not fit, it raises.
            `"reversible"`: only the last state; steps of `torchopt.sgd` with momentum use integers,
            multiples of 2^-44, and are undone to the last bit. The bits that the decay removes from
            a velocity are kept: log2(1 / momentum) bits a step, 0.15 for 0.9. Raises if the loss
            returns another value in the backward pass.
        window: The number of last steps to differentiate; earlier steps and their losses are
            constants. None: all steps.
        tasks: For a batch of tasks in one program: for params, batch and each further argument the
            dimension that counts tasks, like `in_dims` of `torch.func.vmap`. None for one task.
        verify: A `torchopt.diff.Verify`: some of the gradients are also computed by another engine
            and compared; `report` of the returned loop has the results. None: no checks.
        blocks: For `"mixed"`: names of sub-modules whose activations are computed again in the
            backward pass, so only their inputs are kept; () for none. None takes the members of
            each `nn.ModuleList` and `nn.Sequential` whose members are of one class and have
            parameters of the same names and shapes.
        keep_on: Where states are kept: `"device"`, where the parameters are, or `"host"`, in pinned
            memory of the host, from which they are copied back when they are needed. Tensors on the
            CPU stay where they are. Not with `keep="all"` in reverse mode, whose graph cannot be
            moved.
        execute: `"eager"`: operation by operation. `"trace"`: a step and its adjoint are traced,
            once, and the resulting program runs for any number of steps; no compiler is needed.
            `"compile"`: the program is compiled by torch's inductor, which needs a C++ compiler and
            takes seconds at the first call. `"blocks"`: the blocks of `"mixed"` are compiled, equal
            ones once, whatever the depth, and everything else is eager. Besides its inputs, a block
            keeps products of matrices: all in a first derivative, and in a second one as many as
            fit into twice its inputs, parameters and their tangents. A new shape, dtype or value
            of a number that the loss or the optimizer holds causes a new trace, which the logger
            `torchopt.diff.explicit.trace` reports.
        unroll: How many steps one call of a traced program takes, for `execute` "trace" or
            "compile" with `keep="all"` in reverse mode. A call of a program costs 0.05 to 0.1 ms on
            top of its arithmetic; the time to compile grows in proportion to `unroll`. If `unroll`
            does not divide `steps`, a second program takes the remaining steps.
        compile: `compile=True` means `execute="compile"`.

    Returns:
        A function of `(params, batch, *meta, batches=None, state=None, **hypers)` that returns an
        `InnerResult`. Under `torch.func` transforms and in forward-mode AD it runs as the unrolled
        loop, which keeps everything, whatever `keep` says; so does an activation checkpoint in the
        loss under a transform.

    Raises:
        CompilerError: In a call with `"compile"` or `"blocks"`, or in its backward pass: there is
            no C++ compiler, or it fails.
        NotTraceableError: In a call with `"trace"` or `"compile"`: the loss or the optimizer reads
            a value on the host or has a side effect, or the gradient is differentiated. With
            `"blocks"`: a block reads a value on the host, draws random numbers or writes to a
            buffer.
        TypeError: An argument has a wrong type.
        ValueError: A value is out of range, or options exclude each other.

    Example:
        >>> import torch, torchopt
        >>> inner = torchopt.inner_loop(lambda w, x: ((w - x) ** 2).sum(), torchopt.sgd, steps=2)
        >>> w, lr = torch.tensor([1.0], requires_grad=True), torch.tensor(0.25, requires_grad=True)
        >>> result = inner(w, torch.tensor([3.0]), lr=lr)
        >>> result.params.detach()
        tensor([2.5000])
        >>> torch.autograd.grad(result.params.sum(), (w, lr))
        (tensor([0.2500]), tensor(4.))

    References:
        D. Maclaurin, D. Duvenaud, R. P. Adams, Gradient-based Hyperparameter Optimization through
        Reversible Learning, ICML 2015, https://arxiv.org/abs/1502.03492 (the adjoint of a run)

        I. Kemaev et al., Scalable Meta-Learning via Mixed-Mode Differentiation, ICML 2025,
        https://arxiv.org/abs/2505.00793 (`derivative="mixed"`)

        A. Griewank, A. Walther, Algorithm 799: revolve, ACM Trans. Math. Softw. 26(1), 2000,
        https://doi.org/10.1145/347837.347846 (`keep=int`)
    """
    if compile:
        if execute not in ("eager", "compile"):
            raise ValueError(
                f'inner_loop: compile: expected False for execute="{execute}", got True.'
            )
        execute = "compile"
    return Explicit(
        loss, optimizer, steps, derivative, keep, window, tasks, verify, blocks, execute, keep_on,
        unroll,
    )  # fmt: skip
