"""How far features of decoded pixels are from those of the picture: LPIPS, and a kin that needs no download.

The networks are frozen and in nobody's module tree: no checkpoint carries them, no optimizer sees them; they go to
the device of the pictures that they are given. Gradients reach the pixels. Knows nothing of codes.

Legend: B batch, C channels of pictures or features, H W picture, h w feature map.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vq.batches import PictureBatch
from vq.features import EfficientNetLite0, load_features
from vq.losses import Shapes, Weighted, sides
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.errors import ConfigError

EPSILON = 1e-10  # added to the length of a feature vector, as in the authors' code
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, for [-1, 1]
DOWNLOADS = "https://download.pytorch.org/models/"


class Trunk(nn.Module):
    """The convolutions of a torchvision classifier, and which outputs LPIPS compares. Names are torchvision's."""

    file: str  # of the usual download; the digits in it are the first of its SHA-256
    heads: str  # file of the package lpips
    taps: tuple[int, ...]  # layers
    smallest: int  # side of a picture that leaves a pixel in the last map

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.features = nn.Sequential(*layers)

    @property
    def widths(self) -> list[int]:
        """Channels at each tap."""
        before = [list(self.features)[: tap + 1] for tap in self.taps]
        return [[each.out_channels for each in part if isinstance(each, nn.Conv2d)][-1] for part in before]

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        found = []
        for index, layer in enumerate(self.features):
            x_BCHW = layer(x_BCHW)
            if index in self.taps:
                found.append(x_BCHW)
        return found


class VGG16(Trunk):
    """13 convolutions in 5 groups (Simonyan & Zisserman 2015, arXiv 1409.1556, configuration D)."""

    file, heads, smallest = "vgg16-397923af.pth", "vgg.pth", 16
    taps = (3, 8, 15, 22, 29)

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        narrow = 3
        for count, wide in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.ReLU()]
                narrow = wide
        super().__init__(layers)


class AlexNet(Trunk):
    """5 convolutions (Krizhevsky 2014, arXiv 1404.5997)."""

    file, heads, smallest = "alexnet-owt-7be5be79.pth", "alex.pth", 31
    taps = (1, 4, 7, 9, 11)

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        for narrow, wide in ((192, 384), (384, 256), (256, 256)):
            layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.ReLU()]
        super().__init__(layers)


TRUNKS: dict[str, type[VGG16] | type[AlexNet]] = {"vgg": VGG16, "alex": AlexNet}


class LPIPSNet(nn.Module):
    """Two batches of pictures (B,3,H,W) in [-1,1] → distances (B): version 0.1 of the authors' package. Frozen.

    At five layers features are divided by their length at each position; squared differences, weighted by channel
    (`heads`, learned from people's judgements), are averaged over the map; the five numbers are added (Zhang et al.
    2018, arXiv 1801.03924, eq. 1). Smallest pictures: `trunk.smallest`.
    """

    shift_1C11: Tensor
    scale_1C11: Tensor

    def __init__(self, net: Literal["vgg", "alex"] = "vgg"):
        super().__init__()
        self.trunk = TRUNKS[net]()
        self.heads = nn.ParameterList([torch.ones(width) for width in self.trunk.widths])
        self.register_buffer("shift_1C11", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale_1C11", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """What is compared: at each layer, vectors of length 1 (B,C,h,w)."""
        height, width = x_BCHW.shape[2:]
        if min(height, width) < self.trunk.smallest:
            smallest = self.trunk.smallest
            raise ValueError(f"pictures of {height}x{width} px: LPIPS needs at least {smallest}")
        return [unit(each) for each in self.trunk((x_BCHW - self.shift_1C11) / self.scale_1C11)]

    def between(self, a_maps: list[Tensor], b_maps: list[Tensor]) -> Tensor:
        """Distances (B) of two lists that `maps` gave."""
        return torch.stack(
            [
                (head[:, None, None] * (a - b).square()).sum(1).mean((1, 2))
                for head, a, b in zip(self.heads, a_maps, b_maps, strict=True)
            ]
        ).sum(0)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        return self.between(self.maps(a_BCHW), self.maps(b_BCHW))


class LPIPS(Weighted):
    """weight · LPIPS (`LPIPSNet`), mean over pictures.

    net: "vgg", usual for training, or the smaller "alex". backbone: its weights in torchvision's names, a file of
    torch (.pth) or safetensors; or "download", which fetches torchvision's own into torch's cache and checks their
    digest. heads: the authors' file (vgg.pth or alex.pth); null: the one of the installed package lpips, of which
    nothing else is used. Files are read by `check`, before any picture.
    """

    def __init__(
        self,
        weight: float = 1.0,
        net: Literal["vgg", "alex"] = "vgg",
        backbone: str | None = None,
        heads: str | None = None,
    ):
        super().__init__(weight)
        if net not in TRUNKS:
            raise ValueError(f"net={net!r}: one of {', '.join(TRUNKS)}")
        self.name: Literal["vgg", "alex"] = net
        self.backbone, self.heads = backbone, heads
        self.net: LPIPSNet | None = None

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        smallest, side = TRUNKS[self.name].smallest, sides(tokenizer, shapes)[0]
        if side < smallest:
            raise ConfigError(f"LPIPS: net={self.name} needs pictures of at least {smallest} px, not {side}")
        self.net = self.net or load_lpips(self.name, self.backbone, self.heads)

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        self.net = self.net or load_lpips(self.name, self.backbone, self.heads)
        net = self.net = self.net.to(made.x_BCHW.device)
        with torch.no_grad():
            real = net.maps(batch.x_BCHW)
        return self.weight * net.between(real, net.maps(made.x_BCHW)).mean()


class Features(Weighted):
    """weight · mean over layers and positions of ‖f(x) − f(x̂)‖², features f of an image classifier, each of length 1.

    LPIPS without its calibration by people, on EfficientNet-Lite0, whose weights come as a package ("vqlm[features]"):
    its values do not compare with those of LPIPS, but its gradients too ask for texture instead of its average.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__(weight)
        self.net: EfficientNetLite0 | None = None

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        self.net = self.net or load_features()

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        self.net = self.net or load_features()
        net = self.net = self.net.to(made.x_BCHW.device)
        with torch.no_grad():
            real = [unit(each) for each in net.maps(batch.x_BCHW)]
        ours = [unit(each) for each in net.maps(made.x_BCHW)]
        layers = [(a - b).square().sum(1).mean() for a, b in zip(real, ours, strict=True)]
        return self.weight * torch.stack(layers).mean()


def unit(x_BChw: Tensor) -> Tensor:
    """Feature vectors divided by their length, at least in float32 where the network computed in bf16."""
    x_BChw = x_BChw.to(torch.promote_types(x_BChw.dtype, torch.float32))
    return x_BChw / (torch.linalg.vector_norm(x_BChw, dim=1, keepdim=True) + EPSILON)


# --- weights --------------------------------------------------------------------------------------------------


def load_lpips(
    net: Literal["vgg", "alex"] = "vgg", backbone: str | None = None, heads: str | None = None
) -> LPIPSNet:
    """A frozen LPIPS on the CPU; arguments as for `LPIPS`. ConfigError says which file is missing or does not fit."""
    made = LPIPSNet(net)
    _fill(made.trunk, _backbone_weights(made.trunk, net, backbone), backbone or "")
    path = _heads_file(made.trunk, heads)
    names = {f"heads.{index}": f"lin{index}.model.1.weight" for index in range(len(made.heads))}
    found = _read(path)
    missing = [theirs for theirs in names.values() if theirs not in found]
    if missing:
        raise ConfigError(f"{path} holds no heads of LPIPS: {', '.join(missing)} missing")
    _fill(
        made.heads,
        {ours.removeprefix("heads."): found[theirs].flatten() for ours, theirs in names.items()},
        str(path),
    )
    return made


def _backbone_weights(made: Trunk, net: str, backbone: str | None) -> dict[str, Tensor]:
    ways = f"give backbone=PATH of {made.file} (torchvision's weights, .pth or safetensors), or backbone=download"
    if backbone is None:
        raise ConfigError(f"LPIPS with net={net} needs the weights of its network: {ways}")
    if backbone != "download":
        return _read(Path(backbone), ways)
    try:
        return torch.hub.load_state_dict_from_url(
            DOWNLOADS + made.file, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # no network, no space, another digest: each ends here
        raise ConfigError(f"backbone=download: {made.file} cannot be had ({error}); {ways}") from error


def _heads_file(made: Trunk, heads: str | None) -> Path:
    if heads is not None:
        return Path(heads)
    package = importlib.util.find_spec("lpips")  # found, not imported: it would import torchvision
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            f"LPIPS needs its heads: pip install lpips --no-deps, or give heads=PATH of its {made.heads}"
        )
    return Path(package.submodule_search_locations[0], "weights", "v0.1", made.heads)


def _read(path: Path, ways: str = "") -> dict[str, Tensor]:
    """Tensors by name from a file of safetensors, or of torch without code in it."""
    told = f"; {ways}" if ways else ""
    if not path.is_file():
        raise ConfigError(f"{path} is no file{told}")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library has its own
        raise ConfigError(f"{path} cannot be read as weights ({str(error).splitlines()[0]}){told}") from error
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ConfigError(f"{path} does not hold tensors by name{told}")
    return found


def _fill(module: nn.Module, found: dict[str, Tensor], path: str) -> None:
    """Every tensor of `module` from `found`; what else is there (a classifier's last layers) is left."""
    wanted = module.state_dict()
    wrong = [key for key, each in wanted.items() if key not in found or found[key].shape != each.shape]
    if wrong:
        raise ConfigError(
            f"{path} does not fit {type(module).__name__}: missing or of other shape: {', '.join(wrong)}"
        )
    module.load_state_dict({key: found[key] for key in wanted})
