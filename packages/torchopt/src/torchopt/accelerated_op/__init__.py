# SPDX-License-Identifier: Apache-2.0
"""Fused operations: whether they can run, and Adam as a callable."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from torchopt.accelerated_op.adam_op import AdamOp
from torchopt.kernels.devices import explain_unavailable
from torchopt.typing import Device

__all__ = ["AdamOp", "is_available"]


def is_available(devices: Device | Iterable[Device] | None = None) -> bool:
    """Return whether the fused operations run on all of `devices`.

    Args:
        devices: One or several. None stands for the CPU and CUDA together, as in the published
            package: it is false on a machine without a GPU.

    Raises:
        RuntimeError: A name that is not a device.

    Example:
        >>> is_available("cpu")
        True
    """
    if devices is None:
        devices = ("cuda", "cpu")
    elif isinstance(devices, (str, int, torch.device)):
        devices = (devices,)
    wanted = [torch.device(device) for device in devices]
    return all(
        explain_unavailable(device, torch.float32) is None
        and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count())
        for device in wanted
    )
