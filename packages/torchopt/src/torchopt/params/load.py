# SPDX-License-Identifier: Apache-2.0
"""`load_state_dict` of a module that holds fast weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchopt.errors import NotDifferentiableError
from torchopt.params.lineage import lineage_of
from torchopt.params.watched import WatchedDict

__all__ = ["put_back", "start_from_what_is_loaded"]


def start_from_what_is_loaded(modules: Iterable[nn.Module]) -> None:
    """Let `load_state_dict` load into the parameters that modules had before they were stepped.

    Torch would write into the fast weights, whose graph is that of the steps. The modules must be
    watched; their sub-modules are not looked at.
    """
    for submodule in modules:
        table: Any = submodule._parameters
        if not isinstance(table, WatchedDict) or table.loads:
            continue
        table.loads = True
        hooks: Mapping[int, Any] = submodule.__dict__.get("_load_state_dict_pre_hooks", {})
        if not any(isinstance(getattr(hook, "hook", None), _BeforeLoad) for hook in hooks.values()):
            submodule._register_load_state_dict_pre_hook(_BeforeLoad(), with_module=True)


class _BeforeLoad:
    """Puts back the parameters that are loaded.

    A file with the module does not name it: there it is a function of Python that does nothing, so
    that the file can be read where torchopt is not installed.
    """

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
    ) -> None:
        for key, x in list(dict.items(module._parameters)):
            given = state_dict.get(prefix + key)
            if isinstance(x, Tensor) and isinstance(given, Tensor) and given.shape == x.shape:
                put_back(module._parameters, key, x, prefix + key)

    def __deepcopy__(self, memo: dict[int, Any]) -> _BeforeLoad:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, ("", "format")


def put_back(table: dict[str, Any], key: str, x: Tensor, name: str) -> None:
    """Put the parameter whose place `x` took into all of its places.

    Raises:
        NotDifferentiableError: `x` was computed, and from what is not known.
    """
    lineage = lineage_of(x)
    leaf = None if lineage is None else lineage.leaf
    if lineage is None or leaf is None or not leaf.is_leaf:
        if x.is_leaf:
            return
        raise NotDifferentiableError(
            f"load_state_dict: {name!r} is a computed tensor, and loading would change its value "
            "but not its graph; expected a parameter. Put one there first, with "
            "recover_state_dict or an assignment."
        )
    if lineage.grad_fn is not None and x.grad_fn is None:
        return  # stop_gradient made it a parameter in its own right
    table[key] = leaf
    for reference, place in lineage.places:
        other = reference()
        if other is not None and dict.get(other, place) is x:
            other[place] = leaf
