"""The networks that are pruned: a residual network for small images and a transformer for text, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection: ReLU(f(x) + x), after batch norms.

    Where the shape changes, the skip connection is a 1x1 convolution with a batch norm (option B of the paper).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for images of 32x32 pixels: three stages of `blocks` blocks, with 1, 2 and 4 times `width` channels.

    It has 6 `blocks` + 2 layers. x: images (N, channels, H, W). The result are logits (N, classes).

    Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016, Section 4.2.
    """

    def __init__(self, blocks: int = 3, width: int = 16, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        for name, value in (("blocks", blocks), ("width", width), ("classes", classes), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            strides = [1 if stage == 0 else 2, *[1] * (blocks - 1)]
            made = []
            for stride in strides:
                made.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn(self.conv(x))))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet20(width: int = 16, classes: int = 10, channels: int = 3) -> ResNet:
    """The residual network with 20 layers. Arguments and source as of `ResNet`."""
    return ResNet(3, width, classes, channels)
