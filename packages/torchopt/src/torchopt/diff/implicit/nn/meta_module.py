# SPDX-License-Identifier: Apache-2.0
"""A module that distinguishes its own parameters from the meta-parameters that it was given."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.tree import tree_leaves

__all__ = ["MetaGradientModule"]


# The attribute of a constructor that marks modules: the constructor as it was written.
_WRITTEN = "_torchopt_written_init"


def _mark_when_made(cls: type[MetaGradientModule]) -> None:
    """Make the constructor of a class mark a module as soon as it has returned.

    This is done for an instance instead of with the class, because decorators and mixins may give
    the class another constructor, and a metaclass would rule out others.
    """
    # A protocol has a constructor that stands for the next one.
    stand_ins = ("typing", "typing_extensions")
    bases = (base for base in cls.__mro__ if "__init__" in vars(base))
    inits: Iterator[Any] = (base.__init__ for base in bases)  # type: ignore[misc]
    init = next(f for f in inits if getattr(f, "__module__", "") not in stand_ins)
    if getattr(init, _WRITTEN, None) is getattr(init, "__wrapped__", init):
        return

    @functools.wraps(init)
    def made(self: MetaGradientModule, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if getattr(type(self).__init__, _WRITTEN, None) is init:  # not by super().__init__()
            self.__dict__["_is_made"] = True

    setattr(made, _WRITTEN, init)
    cls.__init__ = made  # type: ignore[method-assign]


class MetaGradientModule(nn.Module):
    """A module whose constructor arguments are meta-parameters and meta-modules.

    Tensors that require a gradient and modules in training mode become meta-parameters and
    meta-modules if they were passed to the constructor and are assigned to an attribute. They
    belong to the outer problem, so `parameters()`, `modules()`, `state_dict()`, `to()` and
    `train()` leave them out. All other tensors that require a gradient become parameters, except
    for computed ones with a new name after the constructor: activations that are kept. A module in
    evaluation mode becomes an ordinary sub-module.
    """

    _meta_inputs: dict[int, Any]
    _meta_parameters: dict[str, Tensor | None]
    _meta_modules: dict[str, nn.Module | None]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the instance, which records the arguments of the constructor."""
        instance = super().__new__(cls)
        _mark_when_made(cls)
        found: dict[int, Any] = {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                found[id(leaf)] = leaf
            elif isinstance(leaf, nn.Module) and leaf.training:
                for inner in (*leaf.modules(), *leaf.parameters()):
                    found[id(inner)] = inner
        object.__setattr__(instance, "_meta_inputs", found)
        return instance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_meta_parameters", {})
        object.__setattr__(self, "_meta_modules", {})

    # --- copies -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Ids are valid only in this process and for this object, so a copy makes its own.
        state = {k: v for k, v in self.__dict__.items() if k not in ("_solver_leaves", "_solving")}
        return {**state, "_meta_inputs": list(state.get("_meta_inputs", {}).values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__["_meta_inputs"] = {id(x): x for x in state.get("_meta_inputs", ())}

    def __deepcopy__(self, memo: dict[int, Any]) -> MetaGradientModule:
        """Return a copy with the values that `solve` left, without the graph to meta-parameters."""
        tensors = itertools.chain(self.parameters(), self.meta_parameters(), self.buffers())
        for x in tensors:
            if not x.is_leaf and id(x) not in memo:
                kept = x.detach().clone()
                memo[id(x)] = nn.Parameter(kept) if x.requires_grad else kept
        copied: MetaGradientModule = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # --- attributes -------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        for container in ("_meta_parameters", "_meta_modules"):
            found = self.__dict__.get(container, {})
            if name in found:
                return found[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        containers = self._containers()
        if isinstance(value, Tensor) and value.requires_grad and not self._is_kept(name, value):
            self._require_init("_parameters", "parameters")
            self._forget(name)
            meta = id(value) in self._meta_inputs
            (self.register_meta_parameter if meta else self.register_parameter)(name, value)
        elif isinstance(value, nn.Module):
            self._require_init("_modules", "module")
            self._forget(name)
            meta = id(value) in self._meta_inputs
            (self.add_meta_module if meta else self.add_module)(name, value)
        elif value is None and any(name in found for found in containers):
            next(found for found in containers if name in found)[name] = None
        elif isinstance(value, Tensor) and name in self.__dict__.get("_buffers", {}):
            self._buffers[name] = value
        elif name in self.__dict__.get("_parameters", {}):
            raise TypeError(
                f"cannot assign '{torch.typename(value)}' as parameter '{name}': expected a tensor "
                f"that requires a gradient, or None; write self.{name}.copy_(value) under "
                "torch.no_grad(), or delete the parameter first"
            )
        else:
            self._forget(name)
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        for container in (self._meta_parameters, self._meta_modules):
            if name in container:
                del container[name]
                return
        super().__delattr__(name)

    def __dir__(self) -> list[str]:
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return sorted({*names, *self._meta_parameters, *self._meta_modules})

    def _is_kept(self, name: str, value: Tensor) -> bool:
        """Return whether `value` is an activation that the module keeps, or a computed buffer.

        Activations have a name of their own, and come after the constructor, which may compute
        parameters.
        """
        if value.is_leaf or id(value) in self._meta_inputs:
            return False
        if name in self.__dict__.get("_buffers", {}):
            return True
        named = any(name in found for found in self._containers())
        return not named and "_is_made" in self.__dict__

    def _containers(self) -> list[dict[str, Any]]:
        names = ("_parameters", "_modules", "_buffers", "_meta_parameters", "_meta_modules")
        return [self.__dict__[name] for name in names if name in self.__dict__]

    def _forget(self, name: str) -> None:
        self.__dict__.pop(name, None)
        for container in self._containers():
            container.pop(name, None)

    # --- registration -----------------------------------------------------------------------------

    def _require_init(self, container: str, kind: str) -> None:
        if container not in self.__dict__ or "_meta_parameters" not in self.__dict__:
            raise AttributeError(f"cannot assign {kind} before Module.__init__() call")

    def _check_name(self, name: Any, kind: str, container: dict[str, Any]) -> None:
        if not isinstance(name, str):
            raise TypeError(f"{kind} name should be a string. Got {torch.typename(name)}")
        if "." in name:
            raise KeyError(f"{kind} name can't contain '.'")
        if name == "":
            raise KeyError(f"{kind} name can't be empty string ''")
        if hasattr(self, name) and name not in container:
            raise KeyError(f"attribute '{name}' already exists")

    def _check_parameter(self, name: str, param: Any, kind: str) -> None:
        if not isinstance(param, Tensor):
            raise TypeError(
                f"cannot assign '{torch.typename(param)}' object to {kind} '{name}' "
                "(torch.Tensor or None required)"
            )
        if not param.requires_grad:
            raise ValueError(f"cannot assign Tensor that `requires_grad=False` to {kind} '{name}'")

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        """Add a parameter.

        Raises:
            AttributeError: `__init__` was not called.
            TypeError: The name is not a string, or `param` is not a tensor.
            KeyError: The name is empty, has a dot, or is taken.
            ValueError: `param` requires no gradient, or is a meta-parameter.
        """
        self._require_init("_parameters", "parameters")
        self._check_name(name, "parameter", self._parameters)
        if param is not None:
            self._check_parameter(name, param, "parameter")
            if id(param) in self._meta_inputs:
                raise ValueError(
                    f"cannot assign Tensor that is a meta-parameter to parameter '{name}'. "
                    "Use self.register_meta_parameter() instead."
                )
        self._parameters[name] = param  # type: ignore[assignment]  # plain tensors are allowed

    def register_meta_parameter(self, name: str, param: Tensor | None) -> None:
        """Add a meta-parameter.

        Raises:
            AttributeError: `__init__` was not called.
            TypeError: The name is not a string, or `param` is not a tensor.
            KeyError: The name is empty, has a dot, or is taken.
            ValueError: `param` requires no gradient.
        """
        self._require_init("_parameters", "parameters")
        self._check_name(name, "meta-parameter", self._meta_parameters)
        if param is not None:
            self._check_parameter(name, param, "meta-parameter")
        self._meta_parameters[name] = param

    def _check_module(self, name: str, module: Any, kind: str, container: dict[str, Any]) -> None:
        self._require_init("_modules", "module")
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"{torch.typename(module)} is not a Module subclass")
        self._check_name(name, kind, container)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a sub-module.

        Raises:
            AttributeError: `__init__` was not called.
            TypeError: The name is not a string, or `module` is not a module.
            KeyError: The name is empty, has a dot, or is taken.
            ValueError: `module` is a meta-module, or contains a meta-module or a meta-parameter.
        """
        self._check_module(name, module, "module", self._modules)
        if module is not None and id(module) in self._meta_inputs:
            raise ValueError(
                f"cannot add module that is a meta-module to module '{name}'. "
                "Use self.add_meta_module() instead."
            )
        if module is not None:
            self._require_own(name, module)
        self._modules[name] = module

    def _require_own(self, name: str, module: nn.Module) -> None:
        """Raise if a meta-module would become a part of the inner problem."""
        parts = (*module.named_modules(), *module.named_parameters())
        inner = next((key for key, x in parts if id(x) in self._meta_inputs), None)
        if inner is not None:
            raise ValueError(
                f"cannot add module '{name}': expected a module of the inner problem, got one with "
                f"'{inner}', which was given to the constructor and would be solved for. Assign "
                "it to an attribute of its own and call it from there, or give the constructor the "
                "module around it."
            )

    def register_module(self, name: str, module: nn.Module | None) -> None:
        """Add a sub-module; see `add_module`."""
        self.add_module(name, module)

    def add_meta_module(self, name: str, meta_module: nn.Module | None) -> None:
        """Add a meta-module.

        Raises:
            AttributeError: `__init__` was not called.
            TypeError: The name is not a string, or `meta_module` is not a module.
            KeyError: The name is empty, has a dot, or is taken.
        """
        self._check_module(name, meta_module, "meta-module", self._meta_modules)
        self._meta_modules[name] = meta_module

    def register_meta_module(self, name: str, meta_module: nn.Module | None) -> None:
        """Add a meta-module; see `add_meta_module`."""
        self.add_meta_module(name, meta_module)

    # --- iteration --------------------------------------------------------------------------------

    def meta_parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the meta-parameters; see `named_meta_parameters`."""
        for _, param in self.named_meta_parameters(recurse=recurse):
            yield param

    def named_meta_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors of the meta-parameters, each tensor once.

        Args:
            prefix: Prepended to each name with a dot.
            recurse: Include the parameters of meta-modules and the meta-parameters of sub-modules.
        """
        seen: set[int] = set()
        for name, param in self._all_meta_parameters(recurse):
            if id(param) not in seen:
                seen.add(id(param))
                yield (f"{prefix}.{name}" if prefix else name), param

    def _all_meta_parameters(self, recurse: bool) -> Iterator[tuple[str, Tensor]]:
        for name, param in self._meta_parameters.items():
            if param is not None:
                yield name, param
        if not recurse:
            return
        for name, module in self.named_meta_children():
            yield from module.named_parameters(name, remove_duplicate=False)
            yield from _inner_meta_parameters(name, module)
        for name, module in self.named_children():
            yield from _inner_meta_parameters(name, module)

    def meta_children(self) -> Iterator[nn.Module]:
        """Yield the meta-modules of this module itself."""
        for _, module in self.named_meta_children():
            yield module

    def named_meta_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield names and meta-modules of this module itself, each module once."""
        seen: set[int] = set()
        for name, module in self._meta_modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def meta_modules(self) -> Iterator[nn.Module]:
        """Yield the meta-modules and their sub-modules."""
        for _, module in self.named_meta_modules():
            yield module

    def named_meta_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield names and modules: the meta-modules and their sub-modules.

        Args:
            memo: Modules to leave out.
            prefix: Prepended to each name with a dot.
            remove_duplicate: Yield each module once.
        """
        memo = set() if memo is None else memo
        for name, module in self._meta_modules.items():
            if module is not None:
                inner = f"{prefix}.{name}" if prefix else name
                yield from module.named_modules(memo, inner, remove_duplicate)


def _inner_meta_parameters(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, inner in module.named_modules(prefix=prefix):
        if isinstance(inner, MetaGradientModule):
            for key, param in inner._all_meta_parameters(recurse=False):
                yield f"{name}.{key}", param
            for key, meta in inner.named_meta_children():
                yield from meta.named_parameters(f"{name}.{key}", remove_duplicate=False)
