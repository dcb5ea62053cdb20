# SPDX-License-Identifier: Apache-2.0
"""Compile graphs of operations with inductor, for calls without guards."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.errors import CompilerError
from torchopt.torch_internals.background import Job, code_in_threads, patterns_unloaded
from torchopt.torch_internals.convolutions import weight_gradients_restored
from torchopt.torch_internals.storing import repeated_reads_stored
from torchopt.torch_internals.tracing import repeats_removed, writes

__all__ = ["Compiled", "compiled_graph", "prepare_compiler"]

OPTIONS = {"fallback_random": True, "size_asserts": False}
# A product of matrices, or of a batch of them, becomes a loop if one of its dimensions is at most
# THIN or if it takes at most SMALL multiplications, but never if it takes more than LARGE.
THIN = 2
SMALL, LARGE = 20_000, 2**20
# One entry of each line of at most SHORT numbers is changed by comparing all places with its index.
SHORT = 32
aten = torch.ops.aten
_prepared: list[Job[Any]] = []


def prepare_compiler() -> None:
    """Start what inductor does once in a process: it compiles tests of the processor.

    Who is about to trace a function that is compiled afterwards saves a second or two.
    """
    if not _prepared:
        from torch._inductor import config
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        with config.patch(_trusted_vectors()):
            _prepared.append(Job(valid_vec_isa_list))


@dataclass(frozen=True)
class Compiled:
    """A graph of operations, compiled for calls without guards.

    Attributes:
        function: Runs it. It takes a list of its arguments, which it may empty. The first call
            waits for the C++ compiler.
        results: Tensors like its results, with other values; None: these are not known yet.
    """

    function: Callable[[list[Tensor]], Any]
    results: list[Tensor] | None


def compiled_graph(
    graph: torch.fx.GraphModule,
    examples: Sequence[Tensor],
    told: Callable[[str], str] = lambda why: why,
) -> Compiled:
    """Return a graph of operations compiled by inductor.

    Args:
        graph: The graph.
        examples: Its arguments.
        told: Makes the message of an error from its cause.

    Raises:
        CompilerError: There is no working C++ compiler, or inductor fails. The first call of the
            function raises it too.
    """
    try:
        with torch.no_grad():
            run, jobs, results = _compiled(graph, examples)
    except Exception as error:
        raise CompilerError(told(_why_not_compiled(error))) from error

    def function(arguments: list[Tensor]) -> Any:
        if jobs:
            try:
                for job in tuple(jobs):
                    job.result()
            except Exception as error:
                raise CompilerError(told(_why_not_compiled(error))) from error
            jobs.clear()
        return run(arguments)

    return Compiled(function, results)


_Made = tuple[Callable[[list[Tensor]], Any], list[Job[Any]], "list[Tensor] | None"]


def _compiled(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> _Made:
    """Return the code of a graph, the jobs that compile it, and tensors like its results."""
    from torch._functorch import config as settings
    from torch._inductor import compile_fx, exc

    made = None
    # Before torch 2.13 this function is missing or has other parameters.
    extra = getattr(compile_fx, "create_compiler_config_extra", None)
    takes = () if extra is None else inspect.signature(extra).parameters
    known = hasattr(compile_fx, "compile_fx_forward") and "gm" in takes
    if known and not writes(graph.graph.nodes):
        # Calls between kernels are faster in C++, and compiling one file takes half the time of
        # compiling one for each kernel.
        in_cpp = all(x.device.type == "cpu" for x in examples)
        try:
            made = _compiled_alone(graph, examples, in_cpp=in_cpp)
        except exc.InductorError as error:
            if not in_cpp or _is_of_compiler(error):
                raise
            made = _compiled_alone(graph, examples, in_cpp=False)
    if made is not None:
        return made
    # A hit in this cache would bypass the compilation. Inductor's own cache remains in use.
    with settings.patch(enable_autograd_cache=False):
        options = OPTIONS | _trusted_vectors()
        whole: Any = compile_fx.compile_fx(graph, list(examples), config_patches=options)
    return lambda arguments: whole(*arguments), [], None


def _compiled_alone(
    graph: torch.fx.GraphModule, examples: Sequence[Tensor], *, in_cpp: bool
) -> _Made | None:
    """Return a graph compiled by inductor without AOTAutograd; None if it writes to a tensor.

    AOTAutograd traces the graph again and handles mutations, aliases and gradients. That takes as
    long as the rest of the compilation, and a fifth of the time of a short call.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, config
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without a shape environment, inductor does not use its cache.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    given = [mode.from_tensor(x, static_shapes=True) for x in examples]
    with (
        config.patch(_options(graph, in_cpp=in_cpp)),
        V.set_fake_mode(mode),
        tracing(TracingContext(mode)),
        code_in_threads() as jobs,
        contextlib.ExitStack() as stack,
    ):
        made = _lowered(graph, given)
        if writes(made.graph.nodes):
            return None
        (*_, output) = made.graph.nodes
        for job in _prepared:
            job.wait()
        if not any(map(_is_softmax, made.graph.nodes)):
            stack.enter_context(patterns_unloaded())
        values = [x.meta.get("val") if isinstance(x, torch.fx.Node) else x for x in output.args[0]]
        code: Any = compile_fx.compile_fx_forward(
            made,
            given,
            num_orig_model_outputs=len(values),
            num_example_inputs=len(given),
            compiler_config_extra=compile_fx.create_compiler_config_extra(made),
            inner_compile=functools.partial(compile_fx.compile_fx_inner, cpp_wrapper=in_cpp),
            is_inference=True,
        )
    run: Callable[..., Any] = getattr(code, "current_callable", None) or code
    return run, jobs, _like(values, getattr(code, "output_strides", None))


def _like(values: list[Any], strides: Any) -> list[Tensor] | None:
    """Return tensors like results with these strides, or None if something is not known."""
    found = []
    for x, stride in zip(values, strides or ()):
        if isinstance(x, Tensor) and stride is not None:
            sizes = [*map(int, x.shape)], [*map(int, stride)]
            found.append(torch.empty_strided(*sizes, dtype=x.dtype, device=x.device))
    return found if len(found) == len(values) else None


def _is_softmax(node: torch.fx.Node) -> bool:
    """Return whether this may be part of an attention, for which inductor has a kernel."""
    if node.target is aten.div.Tensor:
        over = node.args[0]
        return isinstance(over, torch.fx.Node) and over.target is aten.exp.default
    return "softmax" in str(node.target)


def _options(graph: torch.fx.GraphModule, *, in_cpp: bool) -> dict[str, Any]:
    """Return inductor's settings for a graph.

    On a CPU inductor converts images to channels-last if the graph has a convolution. Grouped
    convolutions, such as those of a batch of tasks, are then slower than in eager torch.
    """
    options = OPTIONS | {"cpp_wrapper": in_cpp, **_trusted_vectors()}
    if any(map(_has_groups, graph.graph.nodes)):
        options["layout_optimization"] = False
    return options


def _trusted_vectors() -> dict[str, Any]:
    """Return the setting that saves inductor a test of the processor's vector instructions.

    For each set of them it would compile and load a program, which takes as long as to compile a
    small graph. A compiler for torch's headers knows these sets, and torch itself uses them here.
    """
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return {"cpp.vec_isa_ok": True} if known else {}


# The position of the number of groups among the arguments.
_GROUPS: dict[Any, int] = {aten.convolution.default: 8, aten.convolution_backward.default: 9}


def _has_groups(node: torch.fx.Node) -> bool:
    place = _GROUPS.get(node.target)
    return place is not None and bool(node.args[place] != 1)


def _lowered(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Return a graph of the same function in operations that inductor compiles well.

    Products of thin or small matrices become sums, which inductor fuses with the operations around
    them: a library call takes longer than their arithmetic. Pooling windows that tile the image
    become dimensions, because inductor would find the window of each pixel by divisions. One entry
    of each short line, as in the derivative of a cross-entropy, is changed by a mask, because
    inductor would write the lines to memory before. Numbers become constants. On a CPU, results
    that loops over larger tensors read are stored.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    table = dict(select_decomp_table())
    for operation, rewrite in _REWRITES.items():
        table[operation] = functools.partial(_first_of, rewrite, table.get(operation))
    with enable_python_dispatcher():
        made: torch.fx.GraphModule = make_fx(_with_numbers(graph), decomposition_table=table)(
            *examples
        )
    made.graph.eliminate_dead_code()
    if repeats_removed(made) and weight_gradients_restored(made):
        made = make_fx(made)(*examples)  # for the values of the new nodes
    if all(x.device.type == "cpu" for x in examples) and not writes(made.graph.nodes):
        repeated_reads_stored(made)
    return made


def _first_of(first: Any, second: Any, *given: Any, **options: Any) -> Any:
    found = NotImplemented if options else first(*given)
    if found is NotImplemented and second is not None:
        found = second(*given, **options)
    return found


def _with_numbers(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a graph in which the number literals of the traced function are constants."""
    made = torch.fx.Graph()
    known: dict[torch.fx.Node, Any] = {}
    for node in graph.graph.nodes:
        x = _number(graph, node)
        if x is None:
            known[node] = made.node_copy(node, known.__getitem__)
        else:
            given: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
            known[node] = made.call_function(aten.full.default, ([], x.item()), given)
    return torch.fx.GraphModule(graph, made)


def _number(graph: torch.fx.GraphModule, node: torch.fx.Node) -> Tensor | None:
    if node.target not in (aten.lift_fresh_copy.default, aten.lift_fresh.default):
        return None
    source = node.args[0]
    if not (isinstance(source, torch.fx.Node) and source.op == "get_attr"):
        return None
    x: Tensor = getattr(graph, str(source.target))
    return None if x.ndim else x


def _product(first: Tensor, second: Tensor) -> Any:
    (rows, inner), columns = first.shape[-2:], second.shape[-1]
    sizes, count = (rows, inner, columns), first.numel() * columns
    if first.dtype not in (torch.float32, torch.float64) or first.device.type != "cpu":
        return NotImplemented
    if 0 in sizes or count > LARGE or (min(sizes) > THIN and count > SMALL):
        return NotImplemented
    return (first.unsqueeze(-1) * second.unsqueeze(-3)).sum(-2)


def _tiles(window: Any, stride: Any = (), padding: Any = 0, ceil: Any = False, *rest: Any) -> Any:
    """Return the height and width of pooling windows that tile an image, or None."""
    sizes, strides = _pair(window), _pair(stride) or _pair(window)
    whole = len(rest) < 2 or rest[1] is None
    plain = strides == sizes and not any(_pair(padding)) and not ceil and whole
    return sizes if plain else None


def _pair(x: Any) -> tuple[int, ...]:
    found = (x,) if isinstance(x, int) else tuple(x)
    return found * 2 if len(found) == 1 else found


def _pooled(x: Tensor, *rest: Any) -> Any:
    tiles = _tiles(*rest)
    if tiles is None:
        return NotImplemented
    *batch, height, width = x.shape
    rows, columns = height // tiles[0], width // tiles[1]
    cut = x[..., : rows * tiles[0], : columns * tiles[1]]
    return cut.reshape(*batch, rows, tiles[0], columns, tiles[1]).mean((-3, -1))


def _pooled_back(cotangent: Tensor, x: Tensor, *rest: Any) -> Any:
    tiles = _tiles(*rest)
    if tiles is None:
        return NotImplemented
    *batch, height, width = x.shape
    rows, columns = cotangent.shape[-2:]
    share = (cotangent / (tiles[0] * tiles[1])).unsqueeze(-1).unsqueeze(-3)
    whole = share.expand(*batch, rows, tiles[0], columns, tiles[1])
    whole = whole.reshape(*batch, rows * tiles[0], columns * tiles[1])
    beside = [0, width - columns * tiles[1], 0, height - rows * tiles[0]]
    return torch.nn.functional.pad(whole, beside) if any(beside) else whole


def _added(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    here = _places(x, dim, index)
    if here is None or index.shape != source.shape:
        return NotImplemented
    return x + torch.where(here, source, 0.0)


def _written(x: Tensor, dim: int, index: Tensor, value: Any) -> Any:
    here = _places(x, dim, index)
    return NotImplemented if here is None else torch.where(here, value, x)


def _places(x: Tensor, dim: int, index: Tensor) -> Tensor | None:
    """Return a mask of one place in each short line of x along a dimension, or None."""
    if not x.ndim or not x.is_floating_point() or x.device.type != "cpu":
        return None
    lines, along, count = list(x.shape), [1] * x.ndim, x.shape[dim]
    lines[dim], along[dim] = 1, count
    if not 0 < count <= SHORT or list(index.shape) != lines:
        return None
    places = torch.arange(count).view(along)
    # Reading a place at the index raises if the index is out of bounds, as writing there does.
    return places.expand(x.shape).gather(dim, index) == places


_REWRITES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.avg_pool2d.default: _pooled,
    aten.avg_pool2d_backward.default: _pooled_back,
    aten.scatter.value: _written,
    aten.scatter_add.default: _added,
}


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    return causes


def _is_of_compiler(error: BaseException) -> bool:
    from torch._inductor import exc

    return any(isinstance(x, (exc.InvalidCxxCompiler, exc.CppCompileError)) for x in _causes(error))


def _why_not_compiled(error: BaseException) -> str:
    from torch._inductor import exc

    causes = _causes(error)
    if any(isinstance(x, exc.InvalidCxxCompiler) for x in causes):
        return "expected a C++ compiler, found none; install one, or name it in CXX"
    if any(isinstance(x, exc.CppCompileError) for x in causes):
        return "expected a C++ compiler that compiles what inductor writes, got one that fails"
    told = str(error).strip().partition("\n")[0][:120]
    return f"expected a program that inductor compiles, got {type(error).__name__}: {told}"
