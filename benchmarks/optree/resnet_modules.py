# SPDX-License-Identifier: Apache-2.0
"""The ResNets as `torch.nn` modules, and the recorded description the tree benchmarks use.

Most competitors of the benchmark run without torch, so the trees are built from
`resnet_modules.json`, which this script writes from real modules:

    python -m benchmarks.optree.resnet_modules --record   # write the description
    python -m benchmarks.optree.resnet_modules --check    # fail if it is out of date

References:
    Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun, *Deep Residual Learning for Image
    Recognition*, CVPR 2016, https://arxiv.org/abs/1512.03385, Table 1 (the layers) and
    Figure 5 (the two blocks).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

RECORD = Path(__file__).with_name("resnet_modules.json")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, Figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut (He et al. 2016, Figure 5 right)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inputs, outputs, stride)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Return the shortcut's projection, or None where the identity has the right shape."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A residual network of four stages (He et al. 2016, Table 1)."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: list[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(inputs, width, stride))
                inputs = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, 1000)


# block, blocks in each stage, number of parameters
RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int], int]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 11_689_512),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 25_557_032),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 44_549_160),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 60_192_808),
}


def build(name: str) -> ResNet:
    """Return the network without memory behind its tensors (the meta device)."""
    block, depths, expected = RESNETS[name]
    with torch.device("meta"):
        network = ResNet(block, depths)
    count = sum(parameter.numel() for parameter in network.parameters())
    if count != expected:
        raise AssertionError(f"{name} has {count} parameters, expected {expected}")
    return network


def describe(module: nn.Module) -> Any:
    """Return what the tree needs to know of a module.

    A list for Sequential and ModuleList, a dict of children for any other module that has
    some, and for the rest the text `parameters|buffers`, names joined by commas, with
    `=None` after a name that is registered but empty.
    """
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [describe(child) for child in module]
    own = [
        ",".join(name + ("=None" if tensor is None else "") for name, tensor in tensors.items())
        for tensors in (module._parameters, module._buffers)
    ]
    children = {name: child for name, child in module._modules.items() if child is not None}
    if not children:
        return "|".join(own)
    if own != ["", ""]:
        raise ValueError(
            f"{type(module).__name__} has children and tensors of its own; "
            "the description knows only modules with one or the other"
        )
    return {name: describe(child) for name, child in children.items()}


def main() -> int:
    """Write or check the recorded description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    action.add_argument("--check", action="store_true", help=f"compare with {RECORD.name}")
    options = parser.parse_args()
    descriptions = {name: describe(build(name)) for name in RESNETS}
    text = json.dumps(descriptions, separators=(",", ":")).replace('},"resnet', '},\n"resnet')
    text = text + "\n"
    if options.record:
        RECORD.write_text(text, encoding="utf-8")
        return 0
    if RECORD.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{RECORD} does not describe these modules; run this script with --record\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
