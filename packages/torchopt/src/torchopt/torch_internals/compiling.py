# SPDX-License-Identifier: Apache-2.0
"""Graphs of operations compiled by inductor, for calls without guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.errors import CompilerError
from torchopt.torch_internals.tracing import writes

__all__ = ["compiled_graph"]

OPTIONS = {"fallback_random": True, "size_asserts": False}
THIN = 2  # a product of matrices with a dimension of at most so many is a loop
SMALL, LARGE = 20_000, 2**20  # so is one of at most so many multiplications, and none of more
aten = torch.ops.aten


def compiled_graph(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """Return a graph of operations compiled by inductor, called without guards.

    Raises:
        CompilerError: There is no C++ compiler, or it does not work, or inductor fails.
    """
    try:
        with torch.no_grad():
            return _compiled(_rewritten(graph, examples), examples)
    except Exception as error:
        raise CompilerError(_why_not_compiled(error)) from error


def _compiled(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    from torch._functorch import config
    from torch._inductor import compile_fx

    made: list[Any] = []

    def inner(module: torch.fx.GraphModule, given: Sequence[Any], **options: Any) -> Any:
        made.append(compile_fx.compile_fx_inner(module, given, **options))
        plain.append(len(given) == len(examples))
        return made[-1]

    plain = [not writes(graph.graph.nodes)]
    # A hit in this cache would hide what is compiled; that of inductor itself stays in use.
    with config.patch(enable_autograd_cache=False):
        whole: Any = compile_fx.compile_fx(
            graph, list(examples), inner_compile=inner, config_patches=OPTIONS
        )
    code = getattr(made[0], "current_callable", None) if all(plain) and len(made) == 1 else None
    if code is None:
        return whole  # type: ignore[no-any-return]
    # What surrounds it handles mutations, aliases and gradients: a fifth of a short call.
    return lambda *arguments: code(list(arguments))


def _rewritten(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Return a graph of the same function in operations that inductor compiles well.

    A product of thin or small matrices is a sum, which becomes one loop with what is around it: a
    call of a library takes longer than its arithmetic. Windows of a pooling that tile the image are
    dimensions: inductor looks for the windows of each pixel by divisions. Numbers are constants.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    if writes(graph.graph.nodes):
        return graph
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(graph, mode).propagate(*examples)
    made = torch.fx.Graph()
    known: dict[torch.fx.Node, Any] = {}
    for node in graph.graph.nodes:
        rewrite = _REWRITES.get(node.target)
        value = None
        if rewrite is not None:
            value = rewrite(_Writer(made, known, graph), node)
        known[node] = made.node_copy(node, known.__getitem__) if value is None else value
    for node in made.nodes:
        node.meta.clear()
    made.eliminate_dead_code()
    return torch.fx.GraphModule(graph, made)


class _Writer:
    """Writes operations into a graph, of the nodes of another one."""

    def __init__(self, made: torch.fx.Graph, known: Any, module: torch.fx.GraphModule) -> None:
        self._made, self._known, self.module = made, known, module

    def __call__(self, operation: Any, x: Any, *rest: Any, **options: Any) -> Any:
        given = [self._known.get(y, y) if isinstance(y, torch.fx.Node) else y for y in (x, *rest)]
        return self._made.call_function(operation, tuple(given), options)


def _constant(write: _Writer, node: torch.fx.Node) -> Any:
    source = node.args[0]
    if not (isinstance(source, torch.fx.Node) and source.op == "get_attr"):
        return None
    x = getattr(write.module, str(source.target))
    if x.ndim:
        return None
    return write(aten.full.default, [], x.item(), dtype=x.dtype, device=x.device)


def _product(write: _Writer, node: torch.fx.Node) -> Any:
    first, second = node.args
    rows, inner = first.meta["val"].shape[-2:]  # type: ignore[union-attr]
    columns = second.meta["val"].shape[-1]  # type: ignore[union-attr]
    sizes, count = (rows, inner, columns), rows * inner * columns
    dtype = node.meta["val"].dtype
    if dtype not in (torch.float32, torch.float64) or node.meta["val"].device.type != "cpu":
        return None
    if 0 in sizes or count > LARGE or (min(sizes) > THIN and count > SMALL):
        return None
    pairs = write(
        aten.mul.Tensor,
        write(aten.unsqueeze.default, first, -1),
        write(aten.unsqueeze.default, second, -3),
    )
    return write(aten.sum.dim_IntList, pairs, [-2])


def _tiles(window: Any, stride: Any = (), padding: Any = 0, ceil: Any = False, *rest: Any) -> Any:
    """Return height and width of windows that tile an image; None if they do something else."""
    sizes, strides = _pair(window), _pair(stride) or _pair(window)
    whole = len(rest) < 2 or rest[1] is None
    plain = strides == sizes and not any(_pair(padding)) and not ceil and whole
    return sizes if plain else None


def _pair(x: Any) -> tuple[int, ...]:
    found = (x,) if isinstance(x, int) else tuple(x)
    return found * 2 if len(found) == 1 else found


def _pooled(write: _Writer, node: torch.fx.Node) -> Any:
    x, tiles = node.args[0], _tiles(*node.args[1:])
    if tiles is None:
        return None
    *batch, _, _ = x.meta["val"].shape  # type: ignore[union-attr]
    rows, columns = node.meta["val"].shape[-2:]
    cut = write(aten.slice.Tensor, x, -2, 0, rows * tiles[0])
    cut = write(aten.slice.Tensor, cut, -1, 0, columns * tiles[1])
    parts = write(aten.reshape.default, cut, [*batch, rows, tiles[0], columns, tiles[1]])
    return write(aten.mean.dim, parts, [-3, -1])


def _pooled_back(write: _Writer, node: torch.fx.Node) -> Any:
    cotangent, tiles = node.args[0], _tiles(*node.args[2:])
    if tiles is None:
        return None
    *batch, height, width = node.meta["val"].shape
    rows, columns = cotangent.meta["val"].shape[-2:]  # type: ignore[union-attr]
    share = write(aten.div.Tensor, cotangent, tiles[0] * tiles[1])
    share = write(aten.unsqueeze.default, write(aten.unsqueeze.default, share, -1), -3)
    whole = write(aten.expand.default, share, [*batch, rows, tiles[0], columns, tiles[1]])
    whole = write(aten.reshape.default, whole, [*batch, rows * tiles[0], columns * tiles[1]])
    beside = [0, width - columns * tiles[1], 0, height - rows * tiles[0]]
    return write(aten.constant_pad_nd.default, whole, beside) if any(beside) else whole


_REWRITES: dict[Any, Callable[[_Writer, torch.fx.Node], Any]] = {
    aten.lift_fresh_copy.default: _constant,
    aten.lift_fresh.default: _constant,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.avg_pool2d.default: _pooled,
    aten.avg_pool2d_backward.default: _pooled_back,
}


def _why_not_compiled(error: BaseException) -> str:
    from torch._inductor import exc

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    if any(isinstance(x, exc.InvalidCxxCompiler) for x in causes):
        return "expected a C++ compiler, found none; install one, or name it in CXX"
    if any(isinstance(x, exc.CppCompileError) for x in causes):
        return "expected a C++ compiler that compiles what inductor writes, got one that fails"
    told = str(error).strip().partition("\n")[0][:120]
    return f"expected a program that inductor compiles, got {type(error).__name__}: {told}"
