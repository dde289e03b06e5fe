"""The networks that are pruned: a residual network for small images and a transformer for text, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection: ReLU(f(x) + x), after batch norms.

    Where the shape changes, the skip connection is a 1x1 convolution with a batch norm (option B of the paper). It reads every
    `stride`-th pixel by itself, however many channels there are: of such a convolution with a stride, in channels_last, oneDNN of
    torch 2.13 writes the gradient of the weight outside of its memory if the input has fewer than 8 channels, or fewer than 16 on
    a processor with AVX-512, as it may have after a cut (uxlfoundation/oneDNN#6035).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.shortcut = stride, nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x[:, :, :: self.stride, :: self.stride]))


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


class Attention(nn.Module):
    """Causal self-attention with heads of `size` entries; their number follows from the weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        by_head = lambda projected: projected.view(*x.shape[:2], -1, self.size).transpose(1, 2)
        query, key, value = by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(found.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Attention, then an MLP with `hidden` units; both read the normalised residual stream and are added to it."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class GPT(nn.Module):
    """A language model: the logits (N, T, vocabulary) of the symbol after each of the symbols (N, T), int64.

    width: of the residual stream. heads: of each layer, a divisor of `width`. hidden: units of each MLP. length: largest T.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019, Section 2.3.
    """

    def __init__(
        self, vocabulary: int, layers: int, width: int, heads: int, hidden: int, length: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must be >= 1 and divide the width {width}, got {heads}")
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads, hidden, dropout) for _ in range(layers)))
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.decoder = nn.Linear(width, vocabulary)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for last in (block.attention.output, block.fc2):
                nn.init.normal_(last.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, symbols: Tensor) -> Tensor:
        places = torch.arange(symbols.shape[1], device=symbols.device)
        x = self.blocks(self.dropout(self.embedding(symbols) + self.positions(places)))
        return self.decoder(self.norm(x))
