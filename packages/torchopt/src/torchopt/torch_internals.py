# SPDX-License-Identifier: Apache-2.0
"""The private names of torch that this package uses, one function for each purpose."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.errors import CompilerError

__all__ = [
    "FakeTensor",
    "HostReadError",
    "abort_on",
    "any_autocast",
    "any_watched",
    "backward_into",
    "backward_pass",
    "below_transforms",
    "bump_versions",
    "checkpoint_of",
    "collective_options",
    "compiled_graph",
    "count_forward_modes",
    "counts_for_any_autocast",
    "draws_numbers",
    "forward_mode",
    "forward_mode_enabled",
    "gradient_in_transform",
    "has_tangent",
    "in_forward_mode",
    "in_forward_mode_of_this_thread",
    "is_batched",
    "is_batched_backward",
    "is_batched_by_old_vmap",
    "is_checkpoint_in_transform",
    "is_differentiated",
    "is_host_read",
    "is_traced",
    "is_tracked",
    "is_transforming",
    "is_watched",
    "is_wrapped",
    "is_zero_tensor",
    "lifted_constants",
    "pack_hooks",
    "plain_entry",
    "pull_back",
    "reentrant_checkpoint",
    "remove_fsdp_hooks",
    "rpc_agent_is_set",
    "rpc_barrier",
    "split_graph",
    "taken_off_old_vmap",
    "top_saved_tensor_hooks",
    "traced_graph",
    "vmap_lists",
    "with_forward_mode",
    "without_recurrent_kernels",
]

_autograd: Any = torch._C._autograd

#: Called with True: the (pack, unpack) hooks for saved tensors in force in this thread, or None.
top_saved_tensor_hooks: Callable[[bool], tuple[Callable[..., Any], Callable[..., Any]] | None] = (
    _autograd._top_saved_tensors_default_hooks
)

#: Return whether autocast is on for a type of device, in one call for all that torch counts.
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


_engine: Any = torch.autograd.Variable._execution_engine


def backward_into(loss: torch.Tensor, start: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    """Do as `torch.autograd.backward((loss,), (start,), inputs=inputs)`.

    Without what torch makes sure of in Python each time, a fifth of the time on a small network.
    The caller knows that `start` is like `loss`, which requires a gradient, and that there are
    inputs.
    """
    if (
        loss.dtype.is_floating_point
        and _NO_OTHERS.issuperset(map(type, (loss, *inputs)))
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.compiler.is_compiling()
    ):
        _engine.run_backward(
            (loss,),
            (start,),
            False,  # neither keep the graph
            False,  # nor make one
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=True,
        )
    else:
        torch.autograd.backward((loss,), (start,), inputs=tuple(inputs))


def backward_pass(
    loss: torch.Tensor, inputs: Sequence[torch.Tensor], *, retain_graph: bool, create_graph: bool
) -> Sequence[Any]:
    """Return `torch.autograd.grad(loss, inputs, allow_unused=True, ...)` of one number.

    Without what torch makes sure of in Python each time, a fifth of the time on a small network.
    The caller knows that `loss` is one number and requires a gradient.
    """
    if type(loss) is torch.Tensor and loss.dtype.is_floating_point and _are_plain(inputs):
        one = torch.ones_like(loss, memory_format=torch.preserve_format)
        return _run_backward((loss,), (one,), retain_graph, create_graph, inputs)
    return torch.autograd.grad(
        loss, inputs, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )


def pull_back(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
) -> Sequence[Any]:
    """Return `torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)`.

    Without what torch makes sure of in Python each time. The caller knows that the outputs require
    a gradient and that the cotangents are like them.
    """
    if _are_plain(inputs) and _are_plain(outputs):
        return _run_backward(outputs, cotangents, False, False, inputs)
    return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)


def _are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether nothing has to be asked about an operation on tensors."""
    return (
        _NO_OTHERS.issuperset(map(type, tensors))
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.compiler.is_compiling()
    )


def _run_backward(
    outputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[torch.Tensor],
) -> Sequence[Any]:
    found: Sequence[Any] = _engine.run_backward(
        tuple(outputs),
        tuple(cotangents),
        retain_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


_NO_OTHERS = frozenset((torch.Tensor, torch.nn.Parameter))


def counts_for_any_autocast(device: str) -> bool:
    """Return whether `any_autocast` is known to tell of this type of device."""
    if any_autocast():
        return False
    torch.set_autocast_enabled(device, True)
    try:
        return any_autocast()
    finally:
        torch.set_autocast_enabled(device, False)


#: Return whether a tensor is zero without having memory, as the tangent of a constant is.
is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor


def _accepts_lists() -> bool:
    x = torch.zeros(())
    try:
        torch.autograd.graph.increment_version([x])  # since torch 2.6
    except (TypeError, RuntimeError, AttributeError):
        return False
    return x._version == 1


def _bump_one_by_one(tensors: list[Tensor]) -> None:
    for x in tensors:
        torch.autograd.graph.increment_version(x)


#: Record in the versions of tensors that they were written to.
bump_versions: Callable[[list[Tensor]], None] = (
    torch._C._increment_version if _accepts_lists() else _bump_one_by_one
)

#: Return whether a transform of torch.func follows a tensor.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

#: Return whether the caller runs inside of a transform of torch.func.
is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


#: Return whether a tensor is batched by the vmap before torch.func's.
is_batched_by_old_vmap: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda x: False
)

#: Return whether forward mode may follow what happens; off inside of a Function's derivative.
forward_mode_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled


def in_forward_mode() -> bool:
    """Return whether tensors may have tangents."""
    return forward_ad._current_level >= 0


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Return a context in which tensors may have tangents.

    torch has one forward mode for all threads of a process; another thread that enters here waits.
    """
    with _one_forward_mode, forward_ad.dual_level():
        yield


_one_forward_mode = threading.RLock()


def in_forward_mode_of_this_thread() -> bool:
    """Return `in_forward_mode()`, without what another thread does inside of `forward_mode`."""
    if not in_forward_mode():
        return False
    with _one_forward_mode:  # when the other one has left
        return in_forward_mode()


def has_tangent(x: Tensor) -> bool:
    """Return whether forward mode follows a tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


# The hook that packs, and its variable with the checkpoint (or a weak reference to it).
_OF_FORWARD = ("_checkpoint_hook.__init__.<locals>.pack_hook", "frame")
_OF_RECOMPUTATION = ("_recomputation_hook.__init__.<locals>.pack_hook", "target_frame_ref")


def pack_hooks() -> list[Callable[..., Any]]:
    """Return the pack hooks for saved tensors of this thread, outermost first.

    torch shows the innermost pair alone, so they are taken off and put back.
    """
    pairs = []
    try:
        while (pair := top_saved_tensor_hooks(True)) is not None:
            _autograd._pop_saved_tensors_default_hooks()
            pairs.append(pair)
    finally:
        for pair in reversed(pairs):
            _autograd._push_saved_tensors_default_hooks(*pair)
    return [pack for pack, _ in reversed(pairs)]


def checkpoint_of(pack: Callable[..., Any]) -> tuple[Any, bool] | None:
    """Return the checkpoint that a pack hook belongs to, and whether it is being recomputed.

    None for a hook of something else. The checkpoint is the object that torch keeps for a call of
    `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` while it may be recomputed.
    """
    if getattr(pack, "__module__", None) != torch_checkpoint.__name__:
        return None
    for (name, variable), recomputed in ((_OF_FORWARD, False), (_OF_RECOMPUTATION, True)):
        if getattr(pack, "__qualname__", None) == name:
            function = inspect.unwrap(pack)
            cells: Any = function.__closure__
            found = cells[function.__code__.co_freevars.index(variable)].cell_contents
            return (found() if recomputed else found), recomputed
    return None


def reentrant_checkpoint() -> Any:
    """Return the context of the outermost checkpoint with `use_reentrant=True` that runs here.

    None outside of one.
    """
    # Only the forward pass of a torch.autograd.Function switches off both modes.
    if torch.is_grad_enabled() or forward_mode_enabled():
        return None
    if torch.is_inference_mode_enabled():
        return None
    code = torch_checkpoint.CheckpointFunction.forward.__code__
    found = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            found = frame.f_locals["ctx"]
        frame = frame.f_back
    return found


def is_checkpoint_in_transform(error: RuntimeError) -> bool:
    """Return whether a checkpoint raised because it ran inside a transform of torch.func."""
    if not any(part in str(error) for part in ("saved tensor hooks", "setup_context")):
        return False
    code = inspect.unwrap(torch_checkpoint.checkpoint).__code__
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            return True
        trace = trace.tb_next
    return False


def gradient_in_transform(
    function: Callable[[Sequence[Tensor]], tuple[Tensor, Sequence[Any]]], at: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Any]]:
    """Return gradients of a sum inside a transform of torch.func, and what came with the value.

    What `torch.func.grad` computes, with None in the place of its zeros for tensors that the value
    does not depend on at all.

    Args:
        function: From tensors to a 0-dim tensor and a list, whose tensors belong to the caller's
            level in what is returned.
        at: Where.
    """
    internals: Any = eager_transforms
    with internals.grad_increment_nesting() as level, torch.enable_grad():
        wrapped = internals._wrap_all_tensors(tuple(at), level)
        inner = [internals._create_differentiable(x, level) for x in wrapped]
        value, others = function(inner)
        found = torch.autograd.grad(value, inner, create_graph=True, allow_unused=True)

        def lowered(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return internals._undo_create_differentiable(x, level)

        return [lowered(g) for g in found], [lowered(x) for x in others]


def remove_fsdp_hooks(module: Any) -> None:
    """Take off the hooks by which `fully_shard` gathers the parameters of a module."""
    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


@contextlib.contextmanager
def without_recurrent_kernels() -> Iterator[None]:
    """Return a context in which recurrent layers run without mkldnn and cuDNN, whose kernels have
    no forward mode and no second derivative.

    The contexts of `torch.backends` set more than that, and warn where a device is missing.
    """
    internals: Any = torch._C
    # The switches are of the process: the last of its threads to leave puts them back.
    with _switches:
        if not _switched:
            _found[:] = internals._get_mkldnn_enabled(), internals._get_cudnn_enabled()
        _switched.append(None)
        internals._set_mkldnn_enabled(False)
        internals._set_cudnn_enabled(False)
    try:
        yield
    finally:
        with _switches:
            _switched.pop()
            if not _switched:
                internals._set_mkldnn_enabled(_found[0])
                internals._set_cudnn_enabled(_found[1])


_switches = threading.Lock()
_switched: list[None] = []  # one for each that is inside
_found: list[bool] = []


_functorch: Any = torch._C._functorch

# Parsed once: torch takes 5 us to make a key of its name.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
_BATCHED = torch._C._dispatch_key_parse("Batched")


def count_forward_modes() -> int:
    """Return how many forward modes of torch.func the caller runs inside of."""
    stack = _functorch.get_interpreter_stack() or []
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack)


#: A context in which forward mode is on, or off.
with_forward_mode: Callable[[bool], Any] = forward_ad._set_fwd_grad_enabled


def any_watched(tensors: Iterable[Tensor]) -> bool:
    """Return whether a graph, a transform or a forward mode follows what happens to one of them."""
    with_graph = torch.is_grad_enabled()
    with_tangents = forward_ad._current_level >= 0
    if not with_graph and not with_tangents:
        return any(map(is_wrapped, tensors))
    for x in tensors:
        if (
            (with_graph and x.requires_grad)
            or is_wrapped(x)
            or (with_tangents and forward_ad.unpack_dual(x).tangent is not None)
        ):
            return True
    return False


def is_batched_backward(cotangents: Iterable[Tensor]) -> bool:
    """Return whether `is_grads_batched` of torch.autograd.grad hands over a batch of cotangents.

    Those are tensors of a vmap older than torch.func's, which asks a Function for no rule.
    """
    if not torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE):
        return False
    return any(torch._C._dispatch_keys(x).has(_BATCHED) for x in cotangents)


def taken_off_old_vmap(
    tensors: Sequence[Tensor],
) -> tuple[list[Tensor] | None, tuple[int | None, ...], Callable[[Tensor], Tensor]] | None:
    """Return tensors without the batch of that older vmap, where the batches are, and what puts one
    back; None outside of it. The tensors are None in another thread than the one that asked.
    """
    old = [torch._C._dispatch_keys(x).has(_BATCHED) for x in tensors]
    if not any(old):
        return None
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = tuple(0 if o else None for o in old)

    def put_back(x: Tensor) -> Tensor:
        return torch._add_batch_dim(x, 0, level)

    if level < 1:
        return None, dims, put_back
    plain = [torch._remove_batch_dim(x, level, 0, 0) if o else x for x, o in zip(tensors, old)]
    return plain, dims, put_back


def is_watched(x: Tensor) -> bool:
    """Return whether a graph, a transform or a forward mode follows what happens to `x`."""
    return any_watched((x,))


def is_traced() -> bool:
    """Return whether operations are recorded to be run later: a kernel call would not be."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._get_tracing_state() is not None
    )


def is_tracked(x: Tensor) -> bool:
    """Return whether a derivative of x may be asked for at some level, or x belongs to a vmap."""
    return is_batched(x) or is_differentiated(x)


def is_differentiated(x: Tensor) -> bool:
    """Return whether a derivative of x may be asked for at some level: by a graph, a transform or
    a forward mode.
    """
    if not is_wrapped(x):
        return _has_derivative(x)
    with contextlib.ExitStack() as above:
        # What belongs to a level is only seen by it: the levels above are taken off meanwhile.
        for level in range(len(_functorch.get_interpreter_stack() or ()), -1, -1):
            if _functorch.maybe_get_level(x) == level:
                if not _functorch.is_batchedtensor(x) and _has_derivative(x):
                    return True
                x = _functorch.get_unwrapped(x)
            if level:
                above.enter_context(temporarily_pop_interpreter_stack())
        return _has_derivative(below_transforms(x))


def _has_derivative(x: Tensor) -> bool:
    return x.requires_grad or forward_ad.unpack_dual(x, level=0).tangent is not None


def below_transforms(x: Tensor) -> Tensor:
    """Return the tensor below all wrappers of torch.func; its batches are dimensions there."""
    while is_wrapped(x):
        x = _functorch.get_unwrapped(x)
    return x


def plain_entry(x: Tensor) -> Tensor:
    """Return the tensor below all transforms, outside of any graph; of a batch, its first entry."""
    while is_wrapped(x):
        dim = _functorch.maybe_get_bdim(x) if _functorch.is_batchedtensor(x) else -1
        x = _functorch.get_unwrapped(x)
        if dim >= 0:
            x = x.select(dim, 0)
    return x.detach()


def is_batched(x: Tensor) -> bool:
    """Return whether x belongs to a vmap, at some level."""
    while is_wrapped(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


class HostReadError(Exception):
    """A value of a tensor is read on the host, or decides a shape, while a program is traced."""


class _HostReads(TorchDispatchMode):
    """A mode that calls `read` with each tensor whose value goes to the host."""

    def __init__(self, read: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            for x in args:
                if isinstance(x, Tensor):
                    self._read(x)
        if torch.Tag.dynamic_output_shape in func.tags and _shape_depends_on_values(func, args):
            raise HostReadError(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def _shape_depends_on_values(func: Any, args: Any) -> bool:
    if func is not torch.ops.aten.index.Tensor:
        return True
    masks = (torch.bool, torch.uint8)
    return any(isinstance(x, Tensor) and x.dtype in masks for x in args[1])


class _MemoryReads(TorchFunctionMode):
    """A mode that refuses what reads the memory of a tensor past torch's operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_OF_MEMORY:
            raise HostReadError(func.__name__)
        return func(*args, **(kwargs or {}))


_READS_OF_MEMORY = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__))


def traced_graph(
    function: Callable[..., Any], examples: Sequence[Tensor], read: Callable[[Tensor], None]
) -> torch.fx.GraphModule:
    """Return the operations of torch that a function of tensors does, as a graph of them.

    Derivatives that the function takes are operations in the graph. A tensor that is no argument
    is a constant of it.

    Args:
        function: From tensors to a list of tensors.
        examples: Distinct tensors.
        read: Called with each tensor that is no argument whose value is read on the host; raises.

    Raises:
        HostReadError: A value is read past torch's operations, or a shape depends on one.
        RuntimeError: A value that depends on the arguments is read on the host.
    """
    # 0.4 s that only those who trace have to wait.
    from torch.fx.experimental.proxy_tensor import make_fx

    with _HostReads(read), _MemoryReads():
        graph: torch.fx.GraphModule = make_fx(function)(*examples)
    return graph


def is_host_read(error: BaseException) -> bool:
    """Return whether tracing failed because a value was read on the host."""
    return isinstance(error, HostReadError) or "value out of a tracing tensor" in str(error)


def compiled_graph(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """Return a graph of operations compiled by inductor, called without guards.

    Raises:
        CompilerError: There is no C++ compiler, or it does not work, or inductor fails.
    """
    import torch._inductor as inductor

    options = {"fallback_random": True, "size_asserts": False}
    try:
        with torch.no_grad():
            code: Callable[..., Any] = inductor.compile(graph, list(examples), options=options)
    except Exception as error:
        raise CompilerError(_why_not_compiled(error)) from error
    return code


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


def draws_numbers(graph: torch.fx.GraphModule) -> bool:
    """Return whether a graph draws random numbers."""
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def split_graph(
    graph: torch.fx.GraphModule, count: int, cotangents: Sequence[int]
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Return the part of a graph that depends on no cotangent, and the rest.

    The first returns `count` results and then what the second takes before the cotangents.

    Args:
        graph: Its output is a list.
        count: The first so many results depend on no cotangent; the others may.
        cotangents: Which of its arguments are cotangents.
    """
    nodes = list(graph.graph.nodes)
    arguments = [n for n in nodes if n.op == "placeholder"]
    given = [arguments[i] for i in cotangents]
    later = set(given)
    for node in nodes:
        if any(x in later for x in node.all_input_nodes):
            later.add(node)
    (results,) = nodes[-1].args
    wanted = [x for x in results[count:] if isinstance(x, torch.fx.Node)]
    read = [x for n in nodes[:-1] if n in later for x in n.all_input_nodes]
    kept = dict.fromkeys(x for x in (*read, *wanted) if x not in later)
    first = _extracted(
        graph,
        [n for n in arguments if n not in later],
        [n for n in nodes[:-1] if n not in later and n.op != "placeholder"],
        [*results[:count], *kept],
    )
    second = _extracted(
        graph,
        [*kept, *given],
        [n for n in nodes[:-1] if n in later and n.op != "placeholder"],
        results[count:],
    )
    return first, second


def _extracted(
    graph: torch.fx.GraphModule, arguments: Any, nodes: Any, results: Any
) -> torch.fx.GraphModule:
    made = torch.fx.Graph()
    known = {}
    for node in arguments:
        known[node] = made.placeholder(node.name)
        known[node].meta.update(node.meta)
    for node in nodes:
        known[node] = made.node_copy(node, known.__getitem__)
    made.output([known[x] if isinstance(x, torch.fx.Node) else x for x in results])
    made.eliminate_dead_code()
    return torch.fx.GraphModule(graph, made)


def lifted_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds arguments of it, after the others, and return them.

    Those that stand for numbers that the traced function wrote down stay.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    nodes = list(graph.graph.nodes)
    last = [n for n in nodes if n.op == "placeholder"][-1]
    by_identity: dict[int, tuple[Tensor, Any]] = {}
    for node in nodes:
        if node.op != "get_attr":
            continue
        x = getattr(graph, node.target)
        if not isinstance(x, Tensor) or all("lift_fresh" in str(u.target) for u in node.users):
            continue
        if id(x) not in by_identity:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"held_{len(by_identity)}")
                last.meta.update(node.meta)
            by_identity[id(x)] = x, last
        node.replace_all_uses_with(by_identity[id(x)][1])
        graph.graph.erase_node(node)
    for name in {n.target for n in nodes if n.op == "get_attr"} - {
        n.target for n in graph.graph.nodes if n.op == "get_attr"
    }:
        delattr(graph, name)
    graph.recompile()
    return [x for x, _ in by_identity.values()]


def vmap_lists(
    function: Callable[[list[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    dims: Sequence[int | None],
) -> list[Tensor]:
    """Return `torch.func.vmap(function, (dims,), randomness="different")(tensors)`.

    For lists of tensors, without torch's walks of trees in Python: a tenth of the time of 32 tasks
    of a small network. The caller knows that one of `dims` is not None and that they fit.
    """
    size = next(x.shape[d] for x, d in zip(tensors, dims) if d is not None)
    _vmap.lazy_load_decompositions()
    with _vmap.vmap_increment_nesting(size, "different") as level:
        batched = [
            x if d is None else _functorch._add_batch_dim(x, d % x.ndim, level)
            for x, d in zip(tensors, dims)
        ]
        return [_functorch._remove_batch_dim(y, level, size, 0) for y in function(batched)]


_vmap: Any = torch._functorch.vmap


# --- torch.distributed ----------------------------------------------------------------------------


def collective_options(kind: str, timeout: timedelta) -> Any:
    """Return the options of one collective operation, with a limit of its own.

    Args:
        kind: `"AllreduceOptions"`, `"AllgatherOptions"` or `"BroadcastOptions"`.
        timeout: The limit.
    """
    from torch._C import _distributed_c10d  # there is none where torch has no process groups

    options = getattr(_distributed_c10d, kind)()
    options.timeout = timeout
    return options


def abort_on(group: Any, device: str) -> None:
    """End the operations of a process group on a kind of device, if it has a backend for it."""
    with contextlib.suppress(RuntimeError, ValueError):
        group._get_backend(torch.device(device)).abort()


def rpc_agent_is_set(api: Any) -> bool:
    """Return whether remote calls work now, by `torch.distributed.rpc.api`."""
    is_set = getattr(api, "_is_current_rpc_agent_set", None)  # there is none on Windows
    return is_set is not None and bool(is_set())


def rpc_barrier(api: Any, names: set[str]) -> None:
    """Wait until the workers of remote calls of these names have come; none: all of them."""
    everyone = {info.name for info in api._get_current_rpc_agent().get_worker_infos()}
    api._barrier(names or everyone)
