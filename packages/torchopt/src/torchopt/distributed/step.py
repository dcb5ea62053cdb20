# SPDX-License-Identifier: Apache-2.0
"""One step of `TaskParallel`: run this rank's tasks, exchange and deliver, or undo everything."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import member_seed, seeded
from torchopt.distributed.before import Before
from torchopt.distributed.contents import Contents
from torchopt.distributed.gradients import Gradients, gradients_of
from torchopt.distributed.group import share_of
from torchopt.distributed.packet import DifferenceError
from torchopt.distributed.raised import Raised
from torchopt.distributed.signature import Signature
from torchopt.distributed.together import stacked_tasks
from torchopt.errors import NotDifferentiableError, WorkerError

if TYPE_CHECKING:
    from torchopt.distributed.task_parallel import Form, TaskParallel

__all__ = ["MetaStep", "Step"]

_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
_SHORT, _LONG = 1e-3, 1e-2  # least and greatest duration of short tasks drawn together, in seconds


@dataclass(frozen=True)
class MetaStep:
    """The result of one step. `losses` and `owners` are equal on all ranks.

    Attributes:
        losses: The losses L_i of the tasks, `[tasks]`, float64.
        owners: The rank, in the world, that computed each task.
        compute_seconds: Time of this rank's tasks, forward and backward.
        transfer_seconds: Time of waiting for the sums, which includes waiting for slower ranks.
        total_seconds: Time of the whole step.
        bytes_sent: Bytes sent by this rank.
        early_bytes: Bytes of gradients that were sent before the last backward pass ended.
    """

    losses: Tensor
    owners: tuple[int, ...]
    compute_seconds: float
    transfer_seconds: float
    total_seconds: float
    bytes_sent: int
    early_bytes: int
    _weights: Sequence[float] | None = field(repr=False)

    @functools.cached_property
    def loss(self) -> Tensor:
        """The weighted mean sum_i w_i L_i, 0-dim, float64, without a graph."""
        if self._weights is None:
            return self.losses.mean()
        return self.losses @ self.losses.new_tensor(self._weights)

    @property
    def overhead_seconds(self) -> float:
        """Seconds of neither computing nor waiting, such as drawing tasks and filling buckets."""
        return self.total_seconds - self.compute_seconds - self.transfer_seconds


class Step:
    """One step.

    Attributes:
        engine: The engine that takes the step.
        params: The parameters that are differentiated in this step.
        tasks: The number of tasks.
        weights: The weight of each task; they add up to 1.
        signature: The facts that must be the same on every rank.
    """

    def __init__(
        self,
        engine: TaskParallel,
        task_loss: Callable[[Any], Tensor],
        tasks: Sequence[Any],
        weights: Sequence[float] | None,
        params: list[Tensor],
        form: Form,
    ) -> None:
        self.engine = engine
        self.group = engine.group
        self.params = params
        self.form = form
        self._task_loss = task_loss
        self._tasks = tasks
        self.tasks = n = len(tasks)
        total = float(n) if weights is None else float(sum(weights))
        self.weights = [1.0 / total] * n if weights is None else [w / total for w in weights]
        self.signature = Signature(engine, form, params, n, weights)
        self.name = f"the sum of step {engine.steps + 1}"
        # Inside a task of a world of one process, the engine may take another step.
        self._contents = engine.contents.pop() if engine.contents else Contents()
        self.before = Before(engine.modules, params, self._contents, only_shards=engine.is_fsdp)
        shares = [share_of(n, rank, self.group.size) for rank in range(self.group.size)]
        self.owners = [rank for rank, share in enumerate(shares) for _ in share]
        self._uniform = weights is None
        # If no rank has more than one task, there is nothing to draw.
        alone = self.group.size == 1
        self._is_static = engine.schedule == "static" or alone or n <= self.group.size
        self._drawn = 0  # number of tasks drawn by all ranks, as far as this rank knows
        self._done: list[range] = []  # the pieces that this rank has finished
        self._losses: list[Tensor] = []  # the losses of each of these pieces
        self._error: Raised | None = None
        self._purpose = engine.number << 32 | engine.attempts  # for the counter of tasks

    def run(self) -> MetaStep:
        """Take the step."""
        started = time.perf_counter()
        sent = self.group.bytes_sent
        gradients = gradients_of(self)
        try:
            with contextlib.ExitStack() if self.engine.reducers else _NOTHING as stack:
                for reducer in self.engine.reducers:
                    stack.enter_context(reducer.no_sync())
                self._run_tasks(gradients)
            waiting = time.perf_counter()
            try:
                losses, used = self._exchange(gradients)
                waited = time.perf_counter() - waiting
                gradients.deliver(used)
                if self.before.contents:
                    self.before.deliver()
            except Exception as error:
                self._tell_alone(error)
                raise
        except BaseException as error:
            self.before.undo()
            gradients.abandon()
            self._tell_if_fatal(error, None)
            raise
        finally:
            self.engine.contents.append(self._contents)
        self.engine.steps += 1
        self.group.note(f"after step {self.engine.steps}")
        return MetaStep(
            losses,
            tuple(self.group.ranks[owner] for owner in self.owners),
            waiting - started,
            waited,
            time.perf_counter() - started,
            self.group.bytes_sent - sent,
            gradients.early_bytes,
            None if self._uniform else self.weights,
        )

    def _tell_if_fatal(self, error: BaseException, task: str | None) -> None:
        """Tell the others about an exception that ends only this process."""
        watch = None if self.group.session is None else self.group.session.watch
        if watch is not None and not isinstance(error, Exception) and watch.failure is None:
            watch.report(error, task or watch.doing_now)

    def _tell_alone(self, error: Exception) -> None:
        """Tell the others that this rank cannot complete an exchange in which they wait."""
        watch = None if self.group.session is None else self.group.session.watch
        if watch is not None and not isinstance(error, WorkerError):
            watch.report(error, self.name)

    # --- the own tasks ----------------------------------------------------------------------------

    def _run_tasks(self, gradients: Gradients) -> None:
        seed = self.engine.seed
        family = 0 if seed is None else member_seed(seed, self.engine.steps)
        with _NOTHING if seed is None else seeded(family, self.params) as seed_all:
            for piece, is_last in self._own():
                name = self._name_of(piece)
                try:
                    with self.group.task(name, self.engine.timeout):
                        if seed_all is not None:
                            seed_all(member_seed(family, piece[0]))
                        loss = self._loss_of(piece)
                        if not loss.requires_grad:
                            tasks = name.partition(" of ")[0]
                            raise NotDifferentiableError(
                                f"`task_loss`: the loss of {tasks} depends on no parameter."
                            )
                        if len(piece) == 1:
                            gradients.add(piece[0], loss, self.weights[piece[0]], is_last)
                        else:
                            gradients.add(piece[0], self._weighted(loss, piece), 1.0, is_last)
                    self._losses.append(loss.detach())
                    self._done.append(piece)
                except Exception as error:
                    self._fail(error, name)
                    return
                except BaseException as error:  # ends this process, so no rank may wait for it
                    self._tell_if_fatal(error, name)
                    raise
            try:
                self.before.end()
            except TypeError as error:
                self._fail(error, f"the tasks of step {self.engine.steps + 1}")

    def _fail(self, error: Exception, name: str) -> None:
        """Undo the effects of the tasks; the others are told at the end of the step."""
        watch = None if self.group.session is None else self.group.session.watch
        if watch is None or error is watch.failure:
            raise error
        self._error = Raised(error, self.group.world_rank, name)
        self.before.undo()

    def _loss_of(self, piece: range) -> Tensor:
        """Return the loss of a piece; its tasks see no `.grad` and must leave none behind."""
        grads = [p.grad for p in self.params]
        for p, g in zip(self.params, grads):
            if g is not None:
                p.grad = None
        left: list[Tensor | None] = []
        try:
            is_single = len(piece) == 1
            loss = self._loss(self._tasks[piece[0]]) if is_single else self._together(piece)
            left = [p.grad for p in self.params]
        except BaseException:
            self.before.undo()
            raise
        finally:
            for p, g in zip(self.params, grads):
                if p.grad is not g:
                    p.grad = g
        if any(g is not None and bool((g != 0).any()) for g in left):
            raise TypeError(
                "`task_loss`: expected a task that leaves no `.grad` behind, got one that called "
                "backward(); return the whole loss, and take inner gradients by "
                "torch.autograd.grad, or call zero_grad() after them"
            )
        return loss

    def _name_of(self, piece: range) -> str:
        if len(piece) == 1:
            return f"task {piece[0] + 1} of {self.tasks}"
        return f"tasks {piece[0] + 1} to {piece[-1] + 1} of {self.tasks}"

    def _pieces(self, tasks: range) -> list[range]:
        """Return consecutive tasks in pieces that are differentiated together."""
        most = self.engine.tasks_at_once or max(len(tasks), 1)
        return [tasks[k : k + most] for k in range(0, len(tasks), most)]

    def _own(self) -> Iterator[tuple[range, Callable[[], bool]]]:
        """Yield the pieces of this rank's tasks, each with a function: is it the last one?"""
        n, size = self.tasks, self.group.size
        if self._is_static:
            mine = share_of(n, self.group.rank, size)
            for piece in self._pieces(mine):
                yield piece, _yes if piece[-1] == mine[-1] else _no
            return
        started, done = time.perf_counter(), [0]
        chunk = range(self.group.rank, self.group.rank + 1)  # the first task needs no counter
        self._drawn = size
        while chunk:
            following: list[range] = []

            def is_last(following: list[range] = following) -> bool:
                # Called between forward and backward, so that no rank holds a drawn task for long.
                following.append(self._draw((time.perf_counter() - started) / max(done[0], 1)))
                return not following[0]

            for piece in self._pieces(chunk):
                yield piece, is_last if piece[-1] == chunk[-1] else _no
                done[0] += len(piece)
            chunk = following[0] if following else range(0)

    def _draw(self, seconds: float) -> range:
        """Return the next tasks: one, or several if tasks are short (`seconds` each)."""
        n, count = self.tasks, 1
        if 0.0 < seconds < _SHORT:
            share = (n - self._drawn) // (2 * self.group.size)
            count = int(max(_SHORT / seconds, min(_LONG / seconds, share)))
        drawn = self.group.draw(self._purpose, count, self.name, self.engine.timeout)
        first = self.group.size + drawn
        self._drawn = min(n, first + count)
        return range(min(n, first), self._drawn)

    def _together(self, piece: range) -> Tensor:
        """Return the losses of several tasks, `[tasks]`, computed by vmap."""
        stacked = stacked_tasks([self._tasks[i] for i in piece], piece[0])

        def one(task: Any) -> Tensor:
            loss = self._loss(task)
            if any(change is not None for change in self.before.take(1.0)):
                raise TypeError(
                    "`tasks_at_once`: expected tasks that leave the buffers of modules alone, got "
                    "one that writes into them; run the tasks one by one, with tasks_at_once=1"
                )
            return loss

        try:
            losses: Tensor = torch.func.vmap(one)(stacked)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            raise RuntimeError(
                f"`tasks_at_once`: {str(error)[:160]} (under torch.func.vmap). Tasks "
                "that run together must not draw random numbers, and must take gradients with "
                "torch.func.grad or torchopt.inner_loop; run others with tasks_at_once=1."
            ) from error
        return losses

    def _weighted(self, losses: Tensor, piece: range) -> Tensor:
        weights = self.weights[piece[0] : piece[-1] + 1]
        return losses @ torch.tensor(weights, dtype=losses.dtype, device=losses.device)

    def _loss(self, task: Any) -> Tensor:
        loss: Any = self._task_loss(task)
        if hasattr(loss, "full_tensor"):  # a DTensor, maybe with a sum that is pending
            loss = loss.full_tensor()
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"`task_loss`: expected a 0-dim tensor, got {got}.")
        if loss.is_complex():
            raise TypeError(
                f"`task_loss`: expected a real number, got {loss.dtype}; return its real part."
            )
        result: Tensor = loss
        return result

    # --- the exchange -----------------------------------------------------------------------------

    def _exchange(self, gradients: Gradients) -> tuple[Tensor, list[bool]]:
        """Exchange gradients and buffers; return the losses and used parameters of all ranks."""
        if self.group.size == 1:
            gradients.send()
            self.before.changes = gradients.finish(gradients.flags())
            return torch.tensor(self._own_losses()[0], dtype=torch.float64), gradients.used
        try:
            gradients.send()
            own, owners = self._own_losses()
            flags = [self._error is not None, self.before.changed, *gradients.flags()]
            counts, losses = gradients.sums([*map(float, flags), *owners], own)
        except DifferenceError:
            raise self.signature.difference(self.group) from None
        failed, changed, *rest = counts
        if failed:
            for error in self.group.gather_objects(self._error, self.name):
                if error is not None:
                    raise error.as_error()
        m = len(self.params)
        n = m + len(self.form.sparse)
        if not self._is_static:
            self.owners = [int(x) for x in rest[n:]]
        self.before.changes = gradients.finish(rest[:n])
        if changed and not self.engine.deterministic:
            self.before.sum_over(self.group, self.name, self.engine.timeout)
        return losses, [x > 0 for x in rest[:m]]

    def _own_losses(self) -> tuple[list[float], list[float]]:
        """Return `[tasks]` with the losses of this rank's tasks, and the owners if dynamic."""
        losses = [0.0] * self.tasks
        owners = [] if self._is_static else losses.copy()
        if not self._done:
            return losses, owners
        found = self._losses
        if len(found) == 1 == len(self._done[0]):
            first = self._done[0][0]
            losses[first] = found[0].item()
            if owners:
                owners[first] = float(self.group.rank)
            return losses, owners
        if len({(x.dtype, x.device) for x in found}) > 1:
            found = [x.double().cpu() for x in found]
        is_single = all(x.ndim == 0 for x in found)
        whole = torch.stack(found) if is_single else torch.cat([x.reshape(-1) for x in found])
        tasks = [i for piece in self._done for i in piece]
        for i, value in zip(tasks, whole.double().tolist()):
            losses[i] = value
            if owners:
                owners[i] = float(self.group.rank)
        return losses, owners


def _yes() -> bool:
    return True


def _no() -> bool:
    return False
