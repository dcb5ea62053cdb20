# SPDX-License-Identifier: Apache-2.0
r"""Kronecker-factored curvature of a network, inverted: a preconditioner for its Hessian.

For a layer y = W a (where a includes a one for the bias) and a loss l with curvature S S' with
respect to the outputs of the network, the block of the Gauss-Newton matrix for W is

    E[g g' (x) a a'],    g = (d output / dy)' s,  s a column of S.

K-FAC replaces it by G (x) A with G = E[g g'] and A = E[a a']. This matrix is diagonal in the bases
of eigenvectors U_G and U_A of G and A. EK-FAC puts the exact second moments on that diagonal,

    E[(U_G' g)_i^2 (U_A' a)_j^2],

which gives the nearest matrix of that form. Both are inverted block by block, with the ridge added.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.linear_solve.iterate import wide

__all__ = ["Kronecker", "kronecker"]


@dataclass(frozen=True)
class _Block:
    """The inverse of one layer: U_G ((U_G' V U_A) / scale) U_A' for V = [W | b]."""

    weight: str
    bias: str | None
    left: Tensor
    right: Tensor
    scale: Tensor

    @property
    def names(self) -> list[str]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def solved(self, tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
        w = tree[self.weight]
        m, n = self.scale.shape
        bias = self.bias is not None
        if w.numel() != m * (n - bias) or (self.bias is not None and tree[self.bias].numel() != m):
            raise ValueError(
                f"kronecker: expected tensors like those of the layer, {m} rows of {n - bias} "
                f"entries at {self.weight!r}, got the shape {tuple(w.shape)}."
            )
        v = w.reshape(m, -1)
        if self.bias is not None:
            v = torch.cat([v, tree[self.bias].reshape(m, 1)], 1)
        left, right, scale = (x.to(wide(w)) for x in (self.left, self.right, self.scale))
        v = (left @ ((left.mT @ wide(v) @ right) / scale) @ right.mT).to(w.dtype)
        if self.bias is None:
            return {self.weight: v.reshape(w.shape)}
        return {self.weight: v[:, :-1].reshape(w.shape), self.bias: v[:, -1]}


@dataclass(frozen=True)
class Kronecker:
    """The result of `kronecker`, a symmetric positive definite map of trees of parameters.

    Attributes:
        blocks: One inverse for each layer.
    """

    blocks: tuple[_Block, ...] = field(repr=False)

    def __call__(self, tree: Any) -> dict[str, Tensor]:
        """Return the approximate solution for a right-hand side.

        The tree is a dict like the parameters; whole layers may be missing.

        Raises:
            TypeError: The tree is not a dict.
            ValueError: A name or a shape is unknown, or a layer is incomplete.
        """
        if not isinstance(tree, Mapping):
            raise TypeError(
                f"kronecker: expected a dict of parameters by name, got {type(tree).__name__}."
            )
        blocks = [block for block in self.blocks if not tree.keys().isdisjoint(block.names)]
        known = {name for block in blocks for name in block.names}
        odd = sorted(map(str, known ^ set(tree)))
        if odd:
            raise ValueError(
                "kronecker: expected the parameters of whole layers, by the names that they have "
                f"in the module, got a dict where {odd[0]!r} is "
                f"{'missing' if odd[0] in known else 'unknown'}."
            )
        solved = {k: x for block in blocks for k, x in block.solved(tree).items()}
        return {name: solved[name] for name in tree}


def kronecker(
    module: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    ridge: float,
    corrected: bool = True,
) -> Kronecker:
    """Return the inverse of a network's curvature by Kronecker factors, as a preconditioner.

    Pass it as `M=` to `CG`, `MINRES`, `Neumann` and other solvers with that option, if the system
    is the Hessian or the Gauss-Newton matrix of the mean loss of a module plus ridge I. That is the
    system of an inner problem with a penalty ridge / 2 |w|^2. The construction costs `classes`
    backward passes over the batch and two eigendecompositions for each layer.

    How much it saves depends on the system. For the implicit derivatives at the minimum of a small
    network for digits with a penalty of 0.001, conjugate gradients take less than half of the
    iterations, and the Neumann series less than half of the terms. It saves little if the ridge
    dominates, or if the network fits its samples so well that only a few contribute curvature.

    Args:
        module: A module whose parameters belong to `nn.Linear` and `nn.Conv2d` (without groups).
            Positions of a sequence or an image count as separate samples.
        loss: `loss(output, target)` for one sample, from output `[classes]` to a 0-dim tensor, such
            as `torch.nn.functional.cross_entropy`. It should be convex in the output.
        inputs: The inputs, `[samples, ...]`.
        targets: The targets, `[samples, ...]`.
        ridge: The multiple of the identity that is added to the curvature, > 0.
        corrected: True: EK-FAC; False: K-FAC.

    Returns:
        A function of trees like `dict(module.named_parameters())`.

    Raises:
        RuntimeError: It is called inside `torch.inference_mode()`.
        TypeError: A parameter belongs to another kind of layer or to two layers, or is complex;
            there are no parameters; or inputs or targets are not tensors.
        ValueError: The ridge is not positive and finite; there are no samples, or the number of
            targets differs; outputs or losses have other shapes; the network draws random numbers;
            or the curvature is not finite.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import CG, kronecker
        >>> _ = torch.manual_seed(0)
        >>> net, x, y = torch.nn.Linear(3, 2), torch.randn(50, 3), torch.randint(2, (50,))
        >>> loss = torch.nn.functional.cross_entropy
        >>> M = kronecker(net, loss, x, y, ridge=0.1)
        >>> sorted(M(dict(net.named_parameters())))
        ['bias', 'weight']
        >>> solver = CG(M=M)

    References:
        J. Martens, R. Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature, ICML 2015, https://arxiv.org/abs/1503.05671, equation 1

        T. George et al., Fast Approximate Natural Gradient Descent in a Kronecker-factored
        Eigenbasis, NeurIPS 2018, https://arxiv.org/abs/1806.03884

        A. Wang, E. Nguyen, R. Yang, J. Bae, S. A. McIlraith, R. Grosse, Better Training Data
        Attribution via Better Inverse Hessian-Vector Products, NeurIPS 2025,
        https://arxiv.org/abs/2507.14740 (ASTRA, the Neumann series with this preconditioner)
    """
    if not 0 < ridge < math.inf:
        raise ValueError(f"kronecker: ridge: expected a number > 0, got {ridge}.")
    _require_samples(inputs, targets)
    layers = _layers(module)
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in layers}
    made: dict[str, list[Tensor]] = {name: [] for name, _ in layers}

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_()  # it may be frozen
            seen[name].append((*args, *kwargs.values())[0].detach().clone())
            made[name].append(out)
            return out.clone()  # an activation may change the clone in place

        return keep

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers]
    buffers = {name: b.clone() for name, b in module.named_buffers()}  # a BatchNorm writes them
    try:
        with torch.enable_grad(), _drawing_nothing(inputs.device):
            outputs = torch.func.functional_call(module, buffers, (inputs,))
    finally:
        for handle in handles:
            handle.remove()
    repeated = [name for name, outs in made.items() if len(outs) != 1]
    if repeated:
        raise TypeError(
            f"kronecker: expected each layer to run once, got {len(made[repeated[0]])} runs of "
            f"{repeated[0]!r}; use Nystrom, which takes any operator."
        )
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"kronecker: module: expected outputs [samples, classes], got {got}.")
    roots = _roots(loss, outputs.detach(), targets)
    rows = [_rows(layer, seen[name][0]) for name, layer in layers]
    slopes: list[list[Tensor]] = [[] for _ in layers]
    for column in roots.unbind(-1):
        found = torch.autograd.grad(
            outputs,
            [made[name][0] for name, _ in layers],
            column.to(outputs.dtype),
            retain_graph=True,
        )
        for per_layer, (_, layer), g in zip(slopes, layers, found):
            per_layer.append(_of_outputs(layer, g))
    blocks = [
        _block(name, layer, a, torch.stack(g), len(inputs), ridge, corrected)
        for (name, layer), a, g in zip(layers, rows, slopes)
    ]
    return Kronecker(tuple(blocks))


def _require_samples(inputs: Any, targets: Any) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "kronecker: expected to run outside of torch.inference_mode(), which forbids the "
            "backward passes that the factors are computed from."
        )
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor) or not inputs.ndim:
        raise TypeError(
            "kronecker: inputs, targets: expected tensors [samples, ...], got "
            f"{type(inputs).__name__} and {type(targets).__name__}."
        )
    if not len(inputs):
        raise ValueError("kronecker: inputs: expected one sample or more, got none.")
    if not targets.ndim or len(targets) != len(inputs):
        raise ValueError(
            f"kronecker: targets: expected one for each of the {len(inputs)} inputs, got the shape "
            f"{tuple(targets.shape)}."
        )


@contextlib.contextmanager
def _drawing_nothing(device: torch.device) -> Iterator[None]:
    """Return a context that raises if random numbers were drawn in it; it restores generators."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        before = _generators(device)
        yield
        drawn = not all(map(torch.equal, before, _generators(device)))
    if drawn:
        raise ValueError(
            "kronecker: module: expected a network whose outputs depend only on its inputs, got "
            "one that draws random numbers, as dropout does in training mode; call module.eval()."
        )


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(matrix.isfinite().all()):
        raise ValueError(
            "kronecker: expected a finite curvature, got NaN or infinity; check the inputs, the "
            "targets and the parameters."
        )
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers by name; raise if a parameter belongs to another kind of layer."""
    found: list[tuple[str, nn.Module]] = []
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if not own:
            continue
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            found.append((name, layer))
            continue
        raise TypeError(
            "kronecker: expected parameters of nn.Linear and nn.Conv2d without groups, got "
            f"{type(layer).__name__} at {name or 'the module itself'!r}; use Nystrom or Jacobi, "
            "which take any operator."
        )
    if not found:
        raise TypeError(f"kronecker: expected parameters, got {type(module).__name__} without any.")
    if any(p.is_complex() for _, layer in found for p in layer.parameters(recurse=False)):
        raise TypeError("kronecker: expected real parameters, got complex ones; use Nystrom.")
    every = [id(p) for _, layer in found for p in layer.parameters(recurse=False)]
    if len(set(every)) != len(every):
        raise TypeError(
            "kronecker: expected a parameter to belong to one layer, got one that layers share; "
            "use Nystrom or Jacobi, which take any operator."
        )
    return found


def _roots(loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    """Return S, `[samples, classes, columns]`; S S' is the curvature of each sample's loss."""
    hessians = torch.func.vmap(torch.func.hessian(loss))(wide(outputs), targets)
    if hessians.shape != (*outputs.shape, outputs.shape[1]):
        raise ValueError(
            "kronecker: loss: expected a 0-dim tensor for one sample, got the shape "
            f"{tuple(hessians.shape[1:-2])}."
        )
    values, vectors = _eigh(hessians)
    roots: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return roots


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of a layer, with a one for the bias, `[samples, positions, n]`."""
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            raise TypeError(
                "kronecker: expected a Conv2d with numbers as padding and zeros in it, got "
                f"padding={padding!r} and padding_mode={layer.padding_mode!r}; use Nystrom or "
                "Jacobi, which take any operator."
            )
        x = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).mT
    else:
        x = x.reshape(len(x), -1, x.shape[-1])
    return x if layer.bias is None else torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _of_outputs(layer: nn.Module, g: Tensor) -> Tensor:
    """Return the cotangents of the outputs of a layer, `[samples, positions, m]`."""
    if isinstance(layer, nn.Conv2d):
        return g.flatten(2).mT
    return g.reshape(len(g), -1, g.shape[-1])


def _block(
    name: str, layer: nn.Module, a: Tensor, g: Tensor, samples: int, ridge: float, corrected: bool
) -> _Block:
    """Return the inverse of one layer, with a `[samples, positions, n]`, g `[columns, ...]`."""
    a, g = wide(a), wide(g)  # LAPACK has no half precision
    flat_a, flat_g = a.flatten(0, 1), g.flatten(0, 2)
    values_a, right = _eigh(flat_a.mT @ flat_a / samples)
    values_g, left = _eigh(flat_g.mT @ flat_g / len(flat_a))
    if corrected:
        squares_a = (flat_a @ right) ** 2
        squares_g = ((g @ left) ** 2).sum(0).flatten(0, 1)
        scale = squares_g.mT @ squares_a / samples
    else:
        scale = torch.outer(values_g.clamp(min=0), values_a.clamp(min=0))
    prefix = f"{name}." if name else ""
    bias = None if layer.bias is None else f"{prefix}bias"
    return _Block(f"{prefix}weight", bias, left, right, scale + ridge)
