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
    """Make `load_state_dict` load into the parameters that modules had before their first step.

    Torch would write into the fast weights, whose graph would still be that of the steps. The
    modules must be watched. Sub-modules are not visited; pass them too.
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
    """A hook that restores those parameters that `load_state_dict` is about to load.

    A pickle of the module does not mention this class. It holds a built-in function without effect
    instead, so that it can be read where torchopt is not installed.
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
    """Put the parameter that `x` replaced back into all of its places.

    Raises:
        NotDifferentiableError: `x` is a computed tensor that has not replaced a parameter.
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
        return  # stop_gradient made it an independent parameter
    table[key] = leaf
    for reference, place in lineage.places:
        other = reference()
        if other is not None and dict.get(other, place) is x:
            other[place] = leaf
