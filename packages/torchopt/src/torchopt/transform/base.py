# SPDX-License-Identifier: Apache-2.0
"""Make gradient transformations, on lists or on trees, from rules on lists of tensors.

The transformation flattens once, runs the rule, and unflattens once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, Protocol, cast

from torchopt.base import Driver, GradientTransformation, identity, needs_tree
from torchopt.documented import ARGUMENTS, EXAMPLE, RAISES, complete, documented
from torchopt.errors import MismatchError
from torchopt.transform.leaf_rule import LeafRule, init_leaves, overwrite, update_leaves
from torchopt.transform.parts import in_lists, in_trees, parts_of
from torchopt.tree import (
    flatten_up_to,
    located,
    require_tensor_tree,
    tree_flatten,
    tree_map,
    tree_unflatten,
)

__all__ = ["LeafRule", "Wrapper", "as_transformation", "transformation", "transformation_of"]

P = ParamSpec("P")


@dataclass(frozen=True)
class _ListDriver(Driver):
    """Runs a rule on lists, as `chain.flat` passes them."""

    rule: LeafRule
    parts_of: ClassVar[Any] = staticmethod(parts_of)

    def __repr__(self) -> str:
        return repr(self.rule)

    def written(self, old: Any, new: Any) -> Any:
        fields = self.rule.overwritten_fields
        roles = ((getattr(old, f), getattr(new, f)) for f in fields)
        moved = (tree_map(overwrite, *pair, none_is_leaf=True) for pair in roles)
        return new._replace(**dict(zip(fields, moved))) if fields else new

    def init(self, params: Any) -> Any:
        return init_leaves(self.rule, list(params))

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        return update_leaves(self.rule, updates, state, params, inplace=inplace)


@dataclass(frozen=True)
class _TreeDriver(_ListDriver):
    """Runs a rule on trees."""

    def init(self, params: Any) -> Any:
        leaves, spec = tree_flatten(params, none_is_leaf=True)
        try:
            state = init_leaves(self.rule, leaves)
        except MismatchError as error:
            raise located(error, spec) from error.__cause__
        return in_trees(self.rule, state, spec)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(updates, none_is_leaf=True)
        state = in_lists(self.rule, state, spec)
        param_leaves = (
            None if params is None else flatten_up_to(spec, params, "params", spec_of="updates")
        )
        try:
            leaves, state = update_leaves(self.rule, leaves, state, param_leaves, inplace=inplace)
        except MismatchError as error:
            raise located(error, spec) from error.__cause__
        return tree_unflatten(spec, leaves), in_trees(self.rule, state, spec)


@dataclass(frozen=True)
class Wrapper(Driver):
    """A transformation around another one; by default its state is that of the inner one."""

    inner: GradientTransformation

    @property
    def needs_tree(self) -> bool:
        """Whether `inner` needs trees, as masks do."""
        return needs_tree(self.inner)

    def init(self, params: Any) -> Any:
        return self.inner.init(params)

    def update(
        self,
        updates: Any,
        state: Any,
        *positional: Any,
        params: Any | None = None,
        inplace: bool = True,
    ) -> tuple[Any, Any]:
        """Return the result of `step`, which need not check that the updates are tensors."""
        require_tensor_tree(updates, "update(updates, state): a gradient")
        return super().update(updates, state, *positional, params=params, inplace=inplace)


def as_transformation(rule: LeafRule, *, already_flattened: bool) -> GradientTransformation:
    """Return the gradient transformation of `rule`, for lists or for trees."""
    return (_ListDriver if already_flattened else _TreeDriver)(rule).pair()


def with_flattened(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of `function` with the keyword `already_flattened`."""
    signature = inspect.signature(function)
    flattened = inspect.Parameter(
        "already_flattened", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool"
    )
    return signature.replace(parameters=[*signature.parameters.values(), flattened])


class TransformationFactory(Protocol[P]):
    """A function that returns transformations for trees, with variants for lists."""

    flat: Callable[P, GradientTransformation]
    impl: Callable[..., GradientTransformation]
    rule: Callable[P, LeafRule | GradientTransformation | None]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> GradientTransformation:
        """Return a transformation for trees."""


def transformation(
    make: Callable[P, LeafRule | GradientTransformation | None],
) -> TransformationFactory[P]:
    """Turn a function that returns a rule into a factory of transformations.

    The result has the signature and documentation of `make`, and three attributes: `flat`, the same
    for lists of leaves; `impl`, which takes `already_flattened` as a keyword; and `rule`, which is
    `make`. If `make` returns None, the transformation is the identity; if it returns a
    transformation, that is returned as it is.
    """
    example = {}
    if make.__name__.startswith("scale_by_") and "lr" not in inspect.signature(make).parameters:
        direction = f"torchopt.transform.{make.__name__}()"
        call = f"torchopt.chain({direction}, torchopt.transform.scale(-0.01))"
        example = {"Example": EXAMPLE.format(call=call)}
    complete(make, ARGUMENTS, **example)

    def impl(*args: Any, already_flattened: bool = False, **kwargs: Any) -> GradientTransformation:
        rule = make(*args, **kwargs)
        if rule is None:
            return identity()
        if isinstance(rule, GradientTransformation):
            return rule
        return as_transformation(rule, already_flattened=already_flattened)

    @functools.wraps(make)
    def for_trees(*args: P.args, **kwargs: P.kwargs) -> GradientTransformation:
        return impl(*args, already_flattened=False, **kwargs)

    @functools.wraps(make)
    def for_lists(*args: P.args, **kwargs: P.kwargs) -> GradientTransformation:
        return impl(*args, already_flattened=True, **kwargs)

    signature = inspect.signature(make).replace(return_annotation=GradientTransformation)
    for function in (for_trees, for_lists):
        vars(function)["__signature__"] = signature
        function.__annotations__ = make.__annotations__ | {"return": GradientTransformation}
    vars(impl)["__signature__"] = with_flattened(for_trees)
    factory = cast("TransformationFactory[P]", for_trees)
    factory.flat = for_lists
    factory.impl = impl
    factory.rule = make
    return factory


def transformation_of(
    rule: Callable[P, LeafRule], like: Callable[..., Any] | None = None
) -> Callable[[Callable[[], None]], TransformationFactory[P]]:
    """Return the decorator that turns a function into a factory of transformations with `rule`.

    The result has the arguments of `rule`, and the name and docstring of the function. The body of
    the function is not used.

    Args:
        rule: The class of a rule.
        like: See `torchopt.documented.documented`.
    """

    def decorate(named: Callable[[], None]) -> TransformationFactory[P]:
        @functools.wraps(named)
        def make(*args: P.args, **kwargs: P.kwargs) -> LeafRule:
            return rule(*args, **kwargs)

        fields = [
            p.replace(annotation=p.annotation.replace("Hyper", "float | Tensor"))
            for p in inspect.signature(rule).parameters.values()
        ]
        vars(make)["__signature__"] = inspect.Signature(fields, return_annotation="LeafRule")
        make.__annotations__ = {p.name: p.annotation for p in fields} | {"return": "LeafRule"}
        raised = [RAISES] if getattr(rule, "checks", ()) else []
        if getattr(rule, "reads_params", False):
            raised.append("    AssertionError: From `update`, when it is called without `params`.")
        if raised:
            complete(make, Raises="\n".join(raised))
        return transformation(make if like is None else documented(like)(make))

    return decorate
