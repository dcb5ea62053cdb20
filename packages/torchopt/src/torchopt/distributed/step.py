# SPDX-License-Identifier: Apache-2.0
"""One step of `TaskParallel`: run the own tasks, exchange, deliver; or leave all as it was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchopt.diff.zero_order.directions import member_seed, seeded
from torchopt.distributed.before import Before
from torchopt.distributed.gradients import Gradients, gradients_of
from torchopt.distributed.group import DifferenceError, Packet, share_of
from torchopt.distributed.raised import Raised
from torchopt.distributed.signature import Signature
from torchopt.errors import NotDifferentiableError

if TYPE_CHECKING:
    from torchopt.distributed.task_parallel import TaskParallel

__all__ = ["MetaStep", "Step"]

_SHORT, _LONG = 1e-3, 1e-2  # seconds of tasks that are drawn together, where tasks are tiny


@dataclass(frozen=True)
class MetaStep:
    """What came out of one step, the same on every rank but for the times.

    Attributes:
        loss: sum_i w_i L_i, 0-dim, float64, without a graph.
        losses: `[tasks]`, the L_i, float64.
        owners: The rank, in the world, that computed each task.
        compute_seconds: This rank's own tasks, forward and backward.
        transfer_seconds: Waiting for sums after the own tasks were done, for slower ranks too.
        total_seconds: Of the whole step.
        bytes_sent: By this rank.
        early_bytes: Of gradients that were on their way before the last backward pass ended.
    """

    loss: Tensor
    losses: Tensor
    owners: tuple[int, ...]
    compute_seconds: float
    transfer_seconds: float
    total_seconds: float
    bytes_sent: int
    early_bytes: int

    @property
    def overhead_seconds(self) -> float:
        """What is neither computing nor waiting: drawing tasks, filling buckets."""
        return self.total_seconds - self.compute_seconds - self.transfer_seconds


class Step:
    """One step.

    Attributes:
        engine: Whose step it is.
        params: What is differentiated, in this step.
        tasks: Number of tasks.
        weights: Of each task; they add up to 1.
        signature: What must be the same on every rank.
    """

    def __init__(
        self,
        engine: TaskParallel,
        task_loss: Callable[[Any], Tensor],
        tasks: Sequence[Any],
        weights: Sequence[float] | None,
    ) -> None:
        self.engine = engine
        self.group = engine.group
        self.params = engine.params
        self._task_loss = task_loss
        self._tasks = tasks
        self.tasks = n = len(tasks)
        total = float(n) if weights is None else float(sum(weights))
        self.weights = [1.0 / total] * n if weights is None else [w / total for w in weights]
        self.signature = Signature(engine, self.params, n, weights)
        self.name = f"the sum of step {engine.steps + 1}"
        self.before = Before(engine.modules)
        self.owners = [0] * n
        self._losses: dict[int, Tensor] = {}
        self._error: Raised | None = None
        self._counter = f"tasks/{engine.number}/{engine.attempts}"

    def run(self) -> MetaStep:
        """Take the step."""
        started = time.perf_counter()
        sent = self.group.bytes_sent
        gradients = gradients_of(self)
        try:
            with contextlib.ExitStack() as stack:
                for module in self.engine.modules:
                    for part in module.modules():
                        if isinstance(part, nn.parallel.DistributedDataParallel):
                            stack.enter_context(part.no_sync())
                self._run_tasks(gradients)
            waiting = time.perf_counter()
            losses, used = self._exchange(gradients)
            waited = time.perf_counter() - waiting
            gradients.deliver(used)
            self.before.deliver()
        except BaseException as error:
            gradients.abandon()
            self.before.restore()
            self._tell_if_fatal(error, None)
            raise
        finally:
            if self.engine.schedule == "dynamic":
                self.group.discard(self._counter)
        self.engine.steps += 1
        self.group.note(f"after step {self.engine.steps}")
        return MetaStep(
            losses @ torch.tensor(self.weights, dtype=torch.float64),
            losses,
            tuple(self.group.ranks[owner] for owner in self.owners),
            waiting - started,
            waited,
            time.perf_counter() - started,
            self.group.bytes_sent - sent,
            gradients.early_bytes,
        )

    def _tell_if_fatal(self, error: BaseException, task: str | None) -> None:
        """Let the others know of what ends this process and no other."""
        watch = None if self.group.session is None else self.group.session.watch
        if watch is not None and not isinstance(error, Exception) and watch.failure is None:
            watch.report(error, task or watch.doing_now)

    # --- the own tasks ----------------------------------------------------------------------------

    def _run_tasks(self, gradients: Gradients) -> None:
        with self._random() as seed_task:
            for i, is_last in self._own():
                name = f"task {i + 1} of {self.tasks}"
                try:
                    with self.group.task(name, self.engine.timeout):
                        seed_task(i)
                        loss = self._loss(i)
                        gradients.add(i, loss, is_last)
                    self._losses[i] = loss.detach()
                    self.owners[i] = self.group.rank
                except Exception as error:
                    watch = None if self.group.session is None else self.group.session.watch
                    if watch is None or error is watch.failure:
                        raise
                    self._error = Raised(error, self.group.world_rank, name)
                    self.before.restore()
                    return  # the others learn of it at the end of the step
                except BaseException as error:  # the end of this process: nobody must wait for it
                    self._tell_if_fatal(error, name)
                    raise

    def _own(self) -> Iterator[tuple[int, Callable[[], bool]]]:
        """Yield the numbers of this rank's tasks, and whether each is the last one."""
        n, size = self.tasks, self.group.size
        if self.engine.schedule == "static" or size == 1:
            for rank in range(size):
                for i in share_of(n, rank, size):
                    self.owners[i] = rank
            mine = share_of(n, self.group.rank, size)
            for i in mine:
                yield i, _yes if i == mine[-1] else _no
            return
        started, done = time.perf_counter(), [0]
        chunk = self._draw(0.0)
        while chunk:
            following: list[range] = []

            def is_last(following: list[range] = following) -> bool:
                # Asked between forward and backward, so that no rank holds a task for long.
                following.append(self._draw((time.perf_counter() - started) / max(done[0], 1)))
                return not following[0]

            for i in chunk:
                yield i, is_last if i == chunk[-1] else _no
                done[0] += 1
            chunk = following[0] if following else range(0)

    def _draw(self, seconds: float) -> range:
        """Return the next tasks of a rank: one, or several if each takes only `seconds`."""
        n, count = self.tasks, 1
        if 0.0 < seconds < _SHORT:
            share = (n - self._drawn) // (2 * self.group.size)
            count = int(max(_SHORT / seconds, min(_LONG / seconds, share)))
        first = self.group.draw(self._counter, count)
        self._drawn = min(n, first + count)
        return range(min(n, first), self._drawn)

    _drawn = 0

    @contextlib.contextmanager
    def _random(self) -> Iterator[Callable[[int], None]]:
        seed = self.engine.seed
        if seed is None:
            yield lambda i: None
            return
        family = member_seed(seed, self.engine.steps)
        with seeded(family, self.params) as seed_all:
            yield lambda i: seed_all(member_seed(family, i))

    def _loss(self, i: int) -> Tensor:
        loss = self._task_loss(self._tasks[i])
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"`task_loss`: expected a 0-dim tensor, got {got}.")
        if not loss.requires_grad:
            raise NotDifferentiableError(
                f"`task_loss`: the loss of task {i + 1} depends on no parameter."
            )
        return loss

    # --- the exchange -----------------------------------------------------------------------------

    def _exchange(self, gradients: Gradients) -> tuple[Tensor, list[bool]]:
        """Return losses and used parameters of all ranks; gradients and buffers are exchanged."""
        n, m, group, limit = self.tasks, len(self.params), self.group, self.engine.timeout
        row = torch.zeros(2 * n + m + 2, dtype=torch.float64)
        errors, changed, losses, owners, used = row.split([1, 1, n, n, m])
        if self._losses:
            found = list(self._losses.values())
            if len({(x.dtype, x.device) for x in found}) > 1:
                found = [x.double().cpu() for x in found]
            losses[list(self._losses)] = torch.stack(found).double().cpu()
            owners[list(self._losses)] = float(group.rank)
        if group.size == 1:
            self.before.changes = gradients.finish()
            return losses, gradients.used
        try:
            gradients.send()
            used.copy_(torch.tensor(gradients.used))
            errors.fill_(self._error is not None)
            changed.fill_(self.before.changed)
            inside = row if len(row) <= Packet.room else row[:2]
            tail = gradients.tail(Packet.room - len(inside))
            meaning = f"{self.signature.meaning} end {tail is not None}"
            packed = inside if tail is None else torch.cat([inside, tail])
            sums = Packet(group, meaning, packed).sums(self.name, limit)
        except DifferenceError:
            raise self.signature.difference(group) from None
        row[: len(inside)] = sums[: len(inside)]
        if tail is not None:
            gradients.take_tail(sums[len(inside) : len(packed)])
        if len(inside) < len(row):
            row[2:] = group.sum_(row[2:].to(group.device), self.name, limit).cpu()
        if errors.item():
            for error in group.gather_objects(self._error, self.name):
                if error is not None:
                    raise error.as_error()
        self.owners = [int(x) for x in owners]
        self.before.changes = gradients.finish()
        if changed.item() and not self.engine.deterministic:
            self.before.sum_over(group, self.name, limit)
        return losses, [bool(x) for x in used > 0]


def _yes() -> bool:
    return True


def _no() -> bool:
    return False
