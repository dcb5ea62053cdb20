# SPDX-License-Identifier: Apache-2.0
"""A group of parameters in the form that code for torch.optim reads."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from torchopt.tree import optree

__all__ = ["ParamGroup"]


class ParamGroup(tuple[Tensor, ...]):
    """The tensors of a group of an `Optimizer`.

    `group["params"]` is the group itself, so that `torch.amp.GradScaler` and other code that visits
    the parameters of an optimizer can read it. Hyper-parameters are not in the group.

    Example:
        >>> import torch
        >>> group = ParamGroup([torch.ones(1)])
        >>> group["params"] is group
        True
    """

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        if key == "params":
            return self
        raise KeyError(_NO_HYPER.format(key=key))

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise TypeError(_NO_HYPER.format(key=key))


_NO_HYPER = (
    "param_groups: expected the key 'params', got {key!r}; hyper-parameters are not in the groups "
    "of this class: pass a schedule or a tensor for them, or step torchopt.optim.TorchOptimizer"
)

optree.register_pytree_node(
    ParamGroup,
    lambda group: (tuple(group), None),
    lambda _, tensors: tuple(tensors),
    namespace=optree.registry.GLOBAL_NAMESPACE,
)
