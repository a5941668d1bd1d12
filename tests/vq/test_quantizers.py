"""Latent ↔ codes: the fast path against the library, the lookup against the forward pass, refusals."""

import pytest
import torch

from vq.codebook import residuals
from vq.quantizers import check_codes
from vq.quantizers.nearest import nearest_codes
from vq.quantizers.none import NoQuantizer
from vq.quantizers.residual import LibraryResidualQuantizer, ResidualQuantizer

BOTH = [LibraryResidualQuantizer, ResidualQuantizer]


def pair(depth=3, size=48, dim=6, **options):
    """The library's quantizer and ours, with equal codebooks."""
    torch.manual_seed(1)
    library = LibraryResidualQuantizer(dim, size, depth, **options)
    ours = ResidualQuantizer(dim, size, depth, **options)
    for layer in library.vq.layers:
        layer._codebook.embed.normal_()
        layer._codebook.embed_avg.copy_(layer._codebook.embed)
    ours.load_state_dict(library.state_dict())
    return library, ours


@pytest.mark.parametrize("rotation_trick", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_fast_path_gives_the_librarys_own_results_over_many_steps(rotation_trick, depth):
    library, ours = pair(depth, rotation_trick=rotation_trick, decay=0.9)
    for step in range(5):
        made = []
        for quantizer in (library, ours):
            z = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(step)).requires_grad_()
            result = quantizer(z)
            (result.z_BDhw.square().sum() + 3 * result.losses["commitment"]).backward()
            made.append((result, z.grad))
        (theirs, their_gradient), (mine, my_gradient) = made
        assert torch.equal(theirs.codes_BhwQ, mine.codes_BhwQ)
        torch.testing.assert_close(theirs.z_BDhw, mine.z_BDhw, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.losses, mine.losses)
        torch.testing.assert_close(their_gradient, my_gradient, atol=1e-5, rtol=1e-5)
    for name, tensor in library.state_dict().items():
        torch.testing.assert_close(tensor, ours.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", BOTH)
def test_lookup_is_the_forward_pass_in_eval(kind):
    quantizer = kind(5, 32, 4).eval()
    made = quantizer(torch.randn(2, 5, 3, 7))
    assert made.codes_BhwQ.shape == (2, 3, 7, 4)
    assert made.codes_BhwQ.dtype == torch.int64
    torch.testing.assert_close(quantizer.lookup(made.codes_BhwQ), made.z_BDhw, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_eval_changes_no_buffer_and_training_does(kind):
    quantizer = kind(5, 32, 2)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer.eval()(torch.randn(2, 5, 4, 4))
    assert all(torch.equal(v, quantizer.state_dict()[k]) for k, v in before.items())
    quantizer.train()(torch.randn(2, 5, 4, 4))
    assert not torch.equal(before["vq.layers.1._codebook.embed"], quantizer.codebook(1)[None])


@pytest.mark.parametrize("bad", [-1, 32])
def test_lookup_refuses_codes_outside(bad):
    codes = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    codes[0, 1, 1, 2] = bad
    with pytest.raises(ValueError, match=r"0\.\.31"):
        ResidualQuantizer(5, 32, 3).lookup(codes)


def test_check_codes_refuses_other_shapes_and_floats():
    with pytest.raises(ValueError, match="shape"):
        check_codes(torch.zeros(2, 2, 3, dtype=torch.int64), 3, 8)
    with pytest.raises(ValueError, match="integers"):
        check_codes(torch.zeros(1, 2, 2, 3), 3, 8)


@pytest.mark.parametrize("size", [7, 64, 192, 1000])
def test_nearest_codes_agrees_with_float64_distances(size):
    torch.manual_seed(size)
    x, book = torch.randn(500, 9), torch.randn(size, 9)
    expected = torch.cdist(x.double(), book.double()).argmin(1)
    assert torch.equal(nearest_codes(x, book), expected)


def test_nearest_codes_in_many_chunks(monkeypatch):
    x, book = torch.randn(103, 4), torch.randn(128, 4)
    expected = nearest_codes(x, book)
    monkeypatch.setattr(
        "vq.quantizers.nearest.CHUNK_BYTES", 4 * 128 * 10
    )  # ten rows at a time, a rest of three
    assert torch.equal(nearest_codes(x, book), expected)


def test_nearest_codes_takes_the_lowest_index_of_a_tie():
    book = torch.ones(128, 3)
    assert nearest_codes(torch.zeros(4, 3), book).tolist() == [0] * 4


def test_residual_depths_lower_the_error():
    quantizer = ResidualQuantizer(6, 64, 4)
    for _ in range(60):
        quantizer(torch.randn(8, 6, 4, 4))
    means = torch.stack([errors.mean() for _, errors in residuals(quantizer, torch.randn(8, 6, 4, 4))])
    assert bool((means[1:] < means[:-1]).all())


def test_the_null_member_passes_the_latent_and_has_no_codes():
    z = torch.randn(1, 4, 2, 2)
    made = NoQuantizer(4)(z)
    assert made.codes_BhwQ is None
    assert torch.equal(made.z_BDhw, z)
    with pytest.raises(ValueError, match="no codes"):
        NoQuantizer(4).lookup(torch.zeros(1, 2, 2, 1, dtype=torch.int64))


@pytest.mark.parametrize("options", [{"dim": 0}, {"depth": 0}, {"codebook_size": 1}, {"decay": 1.0}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ResidualQuantizer(**{"dim": 4, "codebook_size": 8, **options})
