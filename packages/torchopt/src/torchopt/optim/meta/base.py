# SPDX-License-Identifier: Apache-2.0
"""The optimizer that steps a module differentiably."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchopt.base import GradientTransformation, UninitializedState, require_transformation
from torchopt.optim.gradients import gradients, no_attribute
from torchopt.optim.named_state import StateGroups
from torchopt.optim.states import StepLock
from torchopt.optimizers.short import next_params
from torchopt.params.containers import Slot, SlotCache, parameter_slot_groups, require_replaceable
from torchopt.params.load import start_from_what_is_loaded
from torchopt.params.second_order import warn_of_missing_second_derivatives
from torchopt.params.sharded import gather_in_graph
from torchopt.params.watched import reads_plainly, refuse_reentrant, watch_one
from torchopt.shown import shown
from torchopt.tree import tree_map
from torchopt.typing import ModuleTensorContainers

__all__ = ["MetaOptimizer"]

# The names of parameters, and their shapes.
_Form = tuple[list[str], list[torch.Size]]


class MetaOptimizer(StateGroups):
    """Steps the parameters of a module as part of the graph.

    After a step the module holds fast weights: tensors that are functions of its previous
    parameters. A loss computed from fast weights can be differentiated with respect to the original
    parameters, through any number of steps. The original parameters, and optimizers made for them,
    are untouched; `extract_state_dict` and `recover_state_dict` bring them back.

    Frozen parameters stay as they are. A parameter that several sub-modules or groups share is
    stepped once and stays shared. Buffers are left to the module.

    Hooks registered by `register_hook` on a parameter or a fast weight act on its gradient in every
    step; they do not act on what flows back from later steps. Hooks registered by
    `register_post_accumulate_grad_hook` do not act, and the first step warns about them.

    `load_state_dict` of the module restores its parameters and loads into them. If a fast weight is
    written in place under `torch.no_grad()` or through `.data`, the next step raises.

    A step that raises has changed neither parameters nor states. Under `torch.no_grad()` a step
    makes no graph: the new parameters are leaves. Use that for evaluation, where any number of
    steps then takes the memory of one.

    States that are saved or loaded keep their graph, unless they have to be cast to the dtypes and
    devices of the parameters. Later steps do not write into them.

    Args:
        module: The module to step.
        impl: The gradient transformation.
        first_order: Treat the gradients of the inner losses as constants. The second derivatives of
            the inner losses are neither computed nor stored. The graph still leads through the
            steps to the original parameters, the states and the hyper-parameters.
        detach_every: Detach parameters and states after every `detach_every` steps, so that a
            meta-gradient reaches back over at most that many steps and memory stays bounded.
            Tensors from before keep their graph. None: they are not detached.

    Attributes:
        impl: The gradient transformation of the first module.
        impls: The gradient transformation of each module.
        first_order: The argument; may be changed between steps.
        detach_every: The argument; may be changed between steps.
        param_containers_groups: The parameter dictionaries of each module.
        state_groups: The state of each module; `UninitializedState()` before the first step.

    Raises:
        TypeError: `impl` is not a gradient transformation.
        ValueError: The module has no parameters, or `detach_every` is not a positive integer.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> start = net.weight
        >>> optimizer = torchopt.MetaSGD(net, lr=0.1)
        >>> optimizer.step((net.weight ** 2).sum())
        >>> torch.autograd.grad(net.weight.sum(), start)
        (tensor([[0.8000]]),)
    """

    def __init__(
        self,
        module: nn.Module,
        impl: GradientTransformation,
        *,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        require_transformation(impl, "MetaOptimizer(module, impl)", duck=False)
        if detach_every is not None and not (isinstance(detach_every, int) and detach_every > 0):
            raise ValueError(
                f"detach_every: expected a positive integer or None, got {shown(detach_every)}"
            )
        self.impl = impl
        self.impls: list[GradientTransformation] = []
        self.first_order = first_order
        self.detach_every = detach_every
        self.param_containers_groups: list[ModuleTensorContainers] = []
        self.state_groups: list[Any] = []
        self._modules: list[nn.Module] = []
        self._slots = SlotCache()
        # Names and shapes of the parameters of each state, if they are known.
        self._stepped: list[_Form | None] = []
        self._steps_since_cut = 0
        self._lock = StepLock()
        self.add_param_group(module)
        if not self.param_containers_groups[0]:
            raise ValueError(
                f"{type(self).__name__}(module): expected a module with parameters, got "
                f"{type(module).__name__}, which has none; pass the module whose parameters are to "
                "be stepped"
            )

    def __repr__(self) -> str:
        modules = ", ".join(type(module).__name__ for module in self._modules)
        return f"{type(self).__name__}({modules}, {self.impl!r})"

    if not TYPE_CHECKING:  # type checkers would accept every name
        __getattr__ = no_attribute

    def step(self, loss: Tensor) -> None:
        """Replace the parameters of the modules by the parameters after one step on `loss`.

        Args:
            loss: 0-dim tensor computed from the modules' current parameters.

        Raises:
            TypeError: `loss` is not a tensor.
            ValueError: `loss` is not a scalar, or parameters of a module were added, removed or
                reshaped since the last step.
            NotDifferentiableError: `loss` depends on none of the parameters; a fast weight was
                written in place outside of the graph; or the module recomputes activations with
                `use_reentrant=True`.
        """
        with self._lock:
            try:
                self._step(loss, self._slots.groups(self._modules))
            finally:
                self._slots.release()

    def _step(self, loss: Tensor, slot_groups: list[list[Slot]]) -> None:
        keep_graph = torch.is_grad_enabled()
        curved = keep_graph and not self.first_order
        names = self._slots.names
        refuse_reentrant(self._slots.tables, loss)
        params = [[slot.value for slot in group] for group in slot_groups]
        found = gradients(
            loss,
            params[0] if len(params) == 1 else list(chain.from_iterable(params)),
            names[0] if len(names) == 1 else list(chain.from_iterable(names)),
            create_graph=curved,
            retain_graph=keep_graph,
        )
        start = 0
        steps = []
        for index, group in enumerate(slot_groups):
            own = found if len(group) == len(found) else found[start : start + len(group)]
            start += len(group)
            if curved:
                warn_of_missing_second_derivatives(self._modules[index], own, "step(loss)")
            if group:
                stepped = self._stepped_group(index, names[index], params[index], own)
                steps.append((index, group, *stepped))
        # Nothing is changed before it is known that every group can step.
        plainly = reads_plainly()
        for index, group, present, new_params, state in steps:
            self._stepped[index] = present
            self.state_groups[index] = state
            for slot, new in zip(group, new_params):
                p = slot.value
                if new is not p:
                    if not keep_graph:
                        new.requires_grad_(p.requires_grad)
                    slot.set(new, plainly=plainly)
        self._steps_since_cut += 1
        every = self.detach_every  # may be smaller than in the last step
        if not keep_graph or (every is not None and self._steps_since_cut >= every):
            self._cut([slot for group in slot_groups for slot in group])

    def _stepped_group(
        self,
        index: int,
        names: list[str],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> tuple[_Form, Sequence[Tensor], Any]:
        """Return the names and shapes of the parameters of a module, and its next parameters and
        state.
        """
        impl = self.impls[index]
        present = (names, [p.shape for p in params])
        state = self.state_groups[index]
        if isinstance(state, UninitializedState):
            state = impl.init(tuple(params))
        elif self._stepped[index] not in (None, present):
            raise ValueError(_describe_change(self._stepped[index] or ([], []), present))
        return present, *next_params(impl, params, grads, state)

    def _cut(self, slots: Sequence[Slot]) -> None:
        """Replace the current parameters and states by leaves."""
        self._steps_since_cut = 0
        for slot in slots:
            p = slot.get()
            if p.grad_fn is not None:
                slot.set(p.detach().requires_grad_())
        memo: dict[int, Any] = {}

        def cut(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.grad_fn is None:
                return x
            return memo.setdefault(id(x), x.detach())

        self.state_groups[:] = [tree_map(cut, state) for state in self.state_groups]

    def add_param_group(
        self, module: nn.Module, *, impl: GradientTransformation | None = None
    ) -> None:
        """Add a module to step, with a separate state.

        Args:
            module: The module.
            impl: The gradient transformation of the module, for example with other
                hyper-parameters; None for that of the optimizer.

        Raises:
            TypeError: `impl` is not a gradient transformation.
            ValueError: All parameters of the module are in a group already, or some are in a group
                with another transformation.
        """
        if impl is not None:
            require_transformation(impl, "add_param_group(module, impl=...)", duck=False)
        gather_in_graph(module)
        submodules = [inner for _, inner in require_replaceable(module)]
        if self._modules:
            self._refuse_stepped_twice(module, self.impl if impl is None else impl)
        for submodule in submodules:
            watch_one(submodule)
        start_from_what_is_loaded(submodules)
        held: Any = [inner._parameters for inner in submodules if inner._parameters]
        self.param_containers_groups.append(tuple(held))
        self._modules.append(module)
        self.impls.append(self.impl if impl is None else impl)
        self.state_groups.append(UninitializedState())
        self._stepped.append(None)

    def _refuse_stepped_twice(self, module: nn.Module, impl: GradientTransformation) -> None:
        """Raise if it is not clear which group steps a parameter that several groups share."""
        known = parameter_slot_groups(self._modules)
        owners = {id(slot.get()): i for i, group in enumerate(known) for slot in group}
        own = parameter_slot_groups([module])[0]
        shared = [slot for slot in own if id(slot.get()) in owners]
        if not shared:
            return
        same = all(self.impls[owners[id(slot.get())]] is impl for slot in shared)
        if len(shared) == len(own) or not same:
            raise ValueError(
                "some parameters appear in more than one parameter group: "
                f"{[slot.names[0] for slot in shared[:4]]} of the module; expected a module with "
                "parameters of its own, and shared ones in groups of one transformation (they are "
                "stepped once). Add each module once, or the part that is new."
            )

    def _take_over(self, states: Sequence[Any]) -> None:
        super()._take_over(states)
        self._stepped = [None] * len(self._stepped)
        self._steps_since_cut = 0

    def _names_and_params(self, index: int) -> tuple[list[str], tuple[Tensor, ...]]:
        slots = parameter_slot_groups(self._modules)[index]
        return [slot.names[0] for slot in slots], tuple(slot.get() for slot in slots)


def _describe_change(before: _Form, now: _Form) -> str:
    old, new = dict(zip(*before)), dict(zip(*now))
    found = [f"{name} is gone" for name in old if name not in new]
    found += [f"{name} is new" for name in new if name not in old]
    found += [
        f"{name} had shape {tuple(old[name])}, now {tuple(new[name])}"
        for name in old
        if name in new and old[name] != new[name]
    ]
    return (
        "step(loss): the module changed since the last step, and the state is that of the "
        f"parameters before: {'; '.join(found[:4]) or 'their order'}. Make a new optimizer, or "
        "load a state for the module as it is."
    )
