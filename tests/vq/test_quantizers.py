"""Latent ↔ codes. Every file of conf/quantizer passes the same tests; then each family against another's results.

The other is the library where it has the variant, and the paper's formula written out where it has not.
"""

import random

import pytest
import torch
from tiny import make_quantizer, quantizer_files, small_quantizers
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F
from vector_quantize_pytorch import LFQ, ResidualLFQ, ResidualVQ

from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.codebook import residuals
from vq.losses.codes import Entropy
from vq.quantizers import CodebookQuantizer, check_codes, gumbel
from vq.quantizers.gumbel import GumbelQuantizer
from vq.quantizers.ibq import IndexBackpropagationQuantizer
from vq.quantizers.library import (
    BinarySphericalQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualFiniteScalarQuantizer,
    SimVQQuantizer,
)
from vq.quantizers.nearest import nearest_codes
from vq.quantizers.none import NoQuantizer
from vq.quantizers.product import ProductQuantizer
from vq.quantizers.residual import (
    CosineGradientQuantizer,
    CosineQuantizer,
    GradientQuantizer,
    LibraryResidualQuantizer,
    ResidualQuantizer,
)
from vq.quantizers.soft import entropy_penalty, sample
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm import schema
from vqlm.checkpoint import describe, fingerprint
from vqlm.errors import ConfigError

FILES = quantizer_files()
NODES = small_quantizers()
# files that differ in sizes alone become one
DISCRETE = sorted({str(node): name for name, node in NODES.items() if name != "none"}.values())
LEARNED = [name for name in DISCRETE if issubclass(schema.locate(NODES[name]["_target_"]), CodebookQuantizer)]
every = pytest.mark.parametrize("name", DISCRETE)


@pytest.fixture
def quantizer(name):
    return make_quantizer(NODES[name])


def latent(seed=0, shape=(2, 8, 3, 5), scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- every quantizer ------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 8, 4, 4), (1, 8, 1, 1)])
def test_lookup_is_the_forward_pass_in_eval(quantizer, shape):
    z = latent(shape=shape)
    made = quantizer.eval()(z)
    assert made.z_BDhw.shape == z.shape
    assert made.codes_BhwQ.shape == (shape[0], *shape[2:], quantizer.depth)
    assert made.codes_BhwQ.dtype == torch.int64
    assert made.losses == {}
    torch.testing.assert_close(quantizer.lookup(made.codes_BhwQ), made.z_BDhw, atol=1e-5, rtol=0)


@every
def test_a_picture_gets_the_same_codes_alone_and_in_a_batch(quantizer):
    """Rows, columns and pictures do not get mixed up on the way through a library that takes sequences."""
    z = latent()
    made = quantizer.eval()(z).codes_BhwQ
    for b, i, j in ((0, 0, 4), (1, 2, 0), (1, 1, 3)):
        alone = quantizer(z[b : b + 1, :, i : i + 1, j : j + 1]).codes_BhwQ
        assert torch.equal(alone[0, 0, 0], made[b, i, j])


@every
def test_training_gives_codes_in_range_losses_by_name_and_a_gradient(quantizer):
    for seed in range(3):
        z = latent(seed).requires_grad_()
        made = quantizer(z)
        kept = made.codes_BhwQ.shape[-1]
        assert kept == quantizer.depth or quantizer.least_depth <= kept < quantizer.depth
        assert 0 <= int(made.codes_BhwQ.min()) <= int(made.codes_BhwQ.max()) < quantizer.codebook_size
        assert set(made.losses) == set(quantizer.terms)
        assert all(loss.shape == () and torch.isfinite(loss) for loss in made.losses.values())
        for value in ((made.z_BDhw * latent(9)).sum(), *made.losses.values()):
            (gradient,) = torch.autograd.grad(value, z, retain_graph=True, allow_unused=True)
            if value.requires_grad and gradient is not None:
                assert torch.isfinite(gradient).all()
        (gradient,) = torch.autograd.grad((made.z_BDhw * latent(9)).sum(), z)
        assert gradient.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize("name", sorted(NODES))
def test_each_file_weighs_every_loss_of_its_quantizer(name):
    weighed = {node["term"] for node in FILES[name].get("learner", {}).get("losses", {}).values()}
    assert weighed == set(schema.locate(NODES[name]["_target_"]).terms)


@every
def test_all_codes_are_there_and_each_means_something_else(quantizer):
    K, Q = quantizer.codebook_size, quantizer.depth
    codes = torch.zeros(1, 1, K, Q, dtype=torch.int64)
    for depth in range(Q):
        codes[..., depth] = torch.arange(K)
        z = quantizer.lookup(codes)[0, :, 0].T
        assert len(torch.unique(z, dim=0)) == K
        codes[..., depth] = 0


@every
def test_lookup_takes_every_kind_of_integer(quantizer):
    codes = torch.randint(0, min(quantizer.codebook_size, 100), (1, 2, 3, quantizer.depth))
    expected = quantizer.lookup(codes)
    assert all(torch.equal(quantizer.lookup(codes.to(kind)), expected) for kind in (torch.uint8, torch.int32))


@every
def test_lookup_refuses_what_is_outside(quantizer):
    K, Q = quantizer.codebook_size, quantizer.depth
    for bad in (-1, K):
        codes = torch.zeros(1, 2, 2, Q, dtype=torch.int64)
        codes[0, 1, 1, Q - 1] = bad
        with pytest.raises(ValueError, match=rf"0\.\.{K - 1}"):
            quantizer.lookup(codes)
    for shape in ((2, 2, Q), (1, 2, 2, Q + 1)):
        with pytest.raises(ValueError, match="shape"):
            quantizer.lookup(torch.zeros(shape, dtype=torch.int64))


@every
def test_forward_refuses_other_latents(quantizer):
    for shape in ((2, 7, 3, 3), (2, 8, 3), (8, 3, 3)):
        with pytest.raises(ValueError, match="dim=8"):
            quantizer(torch.zeros(shape))


@every
def test_eval_changes_nothing(quantizer):
    before = state_of(quantizer)
    quantizer.eval()(latent())
    assert all(torch.equal(tensor, quantizer.state_dict()[name]) for name, tensor in before.items())


@every
@pytest.mark.parametrize("value", [0.0, 0.7, 1e4])
def test_constant_latents_work(quantizer, value):
    z = torch.full((2, 8, 2, 2), value, requires_grad=True)
    made = quantizer(z)
    total = made.z_BDhw.sum() + sum(made.losses.values())
    total.backward()
    expected = quantizer.eval()(z.detach())
    torch.testing.assert_close(quantizer.lookup(expected.codes_BhwQ), expected.z_BDhw, atol=1e-5, rtol=0)
    assert torch.isfinite(made.z_BDhw).all()
    assert torch.isfinite(z.grad).all()
    assert all(torch.isfinite(tensor).all() for tensor in quantizer.state_dict().values())
    assert len(torch.unique(made.codes_BhwQ.flatten(0, 2), dim=0)) == 1 or isinstance(
        quantizer, GumbelQuantizer
    )


@every
def test_bfloat16_under_autocast_gives_the_codes_of_the_same_numbers_in_float32(quantizer):
    z = latent(shape=(4, 8, 8, 8)).bfloat16()
    expected = quantizer.eval()(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = quantizer(z)
        quantizer.train()(z.requires_grad_()).z_BDhw.sum().backward()
    assert torch.equal(made.codes_BhwQ, expected.codes_BhwQ)
    torch.testing.assert_close(made.z_BDhw, expected.z_BDhw)
    assert made.z_BDhw.dtype == torch.float32
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", sorted(NODES))
def test_a_saved_tokenizer_gives_the_same_codes_to_the_bit(name, tmp_path):
    quantizer = make_quantizer(NODES[name])
    parts = {"channels": [8, 8], "latent_dim": 8, "blocks": 1, "patch": 4}
    tokenizer = ImageTokenizer(ConvEncoder(**parts), quantizer, ConvDecoder(**parts), 16)
    x = latent(shape=(2, 3, 16, 24)).clamp(-1, 1)
    tokenizer.train()(x)  # averages and the like have moved
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert again.fingerprint == tokenizer.fingerprint
    made, expected = again(x), tokenizer.eval()(x)
    assert torch.equal(made.x_BCHW, expected.x_BCHW)
    if quantizer.depth:
        assert torch.equal(again.encode(x), tokenizer.encode(x))


@every
def test_training_brings_the_quantized_latent_nearer(name):
    """Parameters and averages, on fixed latents with the weights of the file; by angle: some codes are unit vectors."""
    quantizer = make_quantizer(NODES[name])
    terms = FILES[name].get("learner", {}).get("losses", {}).values()
    weights = {node["term"]: node["weight"] for node in terms}
    z = latent(shape=(4, 8, 4, 4), scale=2.0)
    before = 1 - F.cosine_similarity(quantizer.eval()(z).z_BDhw, z).mean()
    parameters = list(quantizer.parameters()) or [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for step in range(40):
        quantizer.anneal(step / 40)
        made = quantizer.train()(z.requires_grad_())
        loss = F.mse_loss(made.z_BDhw, z.detach()) + sum(weights[k] * v for k, v in made.losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = 1 - F.cosine_similarity(quantizer.eval()(z).z_BDhw, z).mean()
    assert after < 0.95 * before


# --- learned codebooks against the library ----------------------------------------------------------------------

GRADIENT = {"learnable_codebook": True, "ema_update": False}
VARIANTS = [  # ours, its arguments, the library's arguments beside its own `shared` and `rotation_trick`
    (ResidualQuantizer, {"depth": 1, "decay": 0.9}, {}),
    (ResidualQuantizer, {"depth": 3, "decay": 0.9}, {}),
    (ResidualQuantizer, {"depth": 3, "decay": 0.9, "shared": True}, {}),
    (ResidualQuantizer, {"depth": 4, "decay": 0.9, "least_depth": 2}, {"quantize_dropout_cutoff_index": 1}),
    (
        ResidualQuantizer,
        {"depth": 4, "decay": 0.9, "least_depth": 1, "shared": True},
        {"quantize_dropout_cutoff_index": 0},
    ),
    (CosineQuantizer, {"depth": 1, "decay": 0.9}, {"use_cosine_sim": True}),
    (CosineQuantizer, {"depth": 3, "decay": 0.9, "shared": True}, {"use_cosine_sim": True}),
    (GradientQuantizer, {"depth": 1}, GRADIENT),
    (GradientQuantizer, {"depth": 3, "shared": True}, GRADIENT),
    (GradientQuantizer, {"depth": 3, "least_depth": 1}, {**GRADIENT, "quantize_dropout_cutoff_index": 0}),
]


def pair(kind, ours, theirs, size=48, dim=6):
    """The library's ResidualVQ and ours, with equal codebooks."""
    torch.manual_seed(1)
    options = {
        "shared_codebook": ours.get("shared", False),
        "rotation_trick": ours["rotation_trick"],
        **theirs,
    }
    library = ResidualVQ(
        dim=dim,
        num_quantizers=ours["depth"],
        codebook_size=size,
        decay=ours.get("decay", 0.9),
        threshold_ema_dead_code=0,
        quantize_dropout="least_depth" in ours,
        **options,
    )
    mine = kind(dim, size, **ours)
    with torch.no_grad():
        for layer in library.layers:
            book = layer._codebook
            book.embed.normal_()
            if kind is CosineQuantizer:
                book.embed.copy_(F.normalize(book.embed, dim=-1))
            book.embed_avg.copy_(book.embed)
        for book in range(mine.books):
            mine.replace_codes(book, torch.arange(size), library.layers[book]._codebook.embed[0])
    return library, mine


@pytest.mark.parametrize("rotation_trick", [False, True])
@pytest.mark.parametrize("kind, ours, theirs", VARIANTS)
def test_fast_path_gives_the_librarys_own_results_over_many_steps(
    kind, ours, theirs, rotation_trick, monkeypatch
):
    library, mine = pair(kind, {**ours, "rotation_trick": rotation_trick}, theirs)
    optimizers = [torch.optim.SGD(p, lr=0.5) for each in (library, mine) if (p := list(each.parameters()))]
    for step in range(6):
        least = ours.get("least_depth", ours["depth"])
        kept = (
            random.Random(step).randrange(least - 1, ours["depth"]) + 1
        )  # as the library draws it from a seed
        monkeypatch.setattr(mine, "_draw_depth", lambda device, kept=kept: kept)
        z = latent(step, (2, 6, 4, 5))
        rows = z.flatten(2).transpose(1, 2).contiguous().requires_grad_()
        their_z, their_codes, their_losses = library(rows, rand_quantize_dropout_fixed_seed=step)
        # with a learned codebook the library's loss pulls both sides at once
        (their_z.square().sum() + 3 * their_losses.sum()).backward()
        z.requires_grad_()
        made = mine(z)
        (made.z_BDhw.square().sum() + 3 * kept * sum(made.losses.values())).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        their_codes = their_codes[..., :kept].reshape(made.codes_BhwQ.shape)
        assert torch.equal(their_codes, made.codes_BhwQ)
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(their_z.transpose(1, 2).reshape(z.shape), made.z_BDhw, **close)
        torch.testing.assert_close(their_losses.sum() / kept, made.losses["commitment"], **close)
        torch.testing.assert_close(rows.grad.transpose(1, 2).reshape(z.shape), z.grad, **close)
    for book in range(mine.books):
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(library.layers[book]._codebook.embed[0], mine.codebook(book), **close)
        if hasattr(mine, "vq"):
            for part in ("cluster_size", "embed_avg"):
                theirs_part = getattr(library.layers[book]._codebook, part)
                torch.testing.assert_close(theirs_part, getattr(mine._book(book), part), **close)


def test_state_dicts_of_the_fast_path_and_of_the_library_fit_each_other():
    library, ours = LibraryResidualQuantizer(6, 16, 2), ResidualQuantizer(6, 16, 2)
    ours(latent(shape=(2, 6, 4, 4)))
    library.load_state_dict(ours.state_dict())
    z = latent(1, (2, 6, 4, 4))
    made, theirs = ours(z), library(z)
    assert torch.equal(made.codes_BhwQ, theirs.codes_BhwQ)
    torch.testing.assert_close(made.losses, theirs.losses)


@pytest.mark.parametrize(
    "kind, expected",
    [(ResidualQuantizer, "7c56f11d7434416b"), (LibraryResidualQuantizer, "0f71d074a88d41cc")],
)
def test_a_tokenizer_of_version_0_1_0_keeps_its_fingerprint(kind, expected):
    """Options that came later are not in its description. The numbers were computed by version 0.1.0."""
    quantizer = kind(4, 16, 2)
    for index, (_, tensor) in enumerate(sorted(quantizer.state_dict().items())):
        if tensor.is_floating_point():
            tensor.copy_((torch.arange(tensor.numel()) / 64 + index).view(tensor.shape))
    assert fingerprint(quantizer) == expected


def test_an_option_that_is_used_is_in_the_description():
    plain, shared = ResidualQuantizer(4, 16, 2), ResidualQuantizer(4, 16, 2, shared=True)
    assert "shared" not in describe(plain)
    assert describe(shared)["shared"] is True
    assert "least_depth" not in describe(shared)
    assert describe(GradientQuantizer(4, 16))["shared"] is False


def test_dropped_depths_are_neither_trained_nor_counted():
    quantizer = ResidualQuantizer(6, 16, 4, least_depth=1)
    seen = set()
    for step in range(40):
        before = [state_of(quantizer._book(d)) for d in range(4)]
        kept = quantizer(latent(step, (2, 6, 4, 4))).codes_BhwQ.shape[-1]
        seen.add(kept)
        for depth in range(4):
            moved = not torch.equal(before[depth]["embed"], quantizer.codebook(depth)[None])
            assert moved == (depth < kept)
    assert seen == {1, 2, 3, 4}
    assert quantizer.eval()(latent(0, (2, 6, 4, 4))).codes_BhwQ.shape[-1] == 4


def test_replaced_codes_survive_the_next_step():
    """In every buffer: a code written into the embedding alone is wiped by the next average."""
    for kind in (ResidualQuantizer, CosineQuantizer, GradientQuantizer, CosineGradientQuantizer):
        quantizer = kind(6, 16)
        wanted = F.normalize(torch.full((1, 6), 1.0), dim=1)
        quantizer.replace_codes(0, torch.tensor([3]), 2 * wanted)
        wanted = wanted if "Cosine" in kind.__name__ else 2 * wanted
        torch.testing.assert_close(quantizer.codebook(0)[3:4], wanted)
        quantizer(-latent(0, (2, 6, 4, 4)).abs())
        torch.testing.assert_close(quantizer.codebook(0)[3:4], wanted, atol=1e-4, rtol=1e-4)


def test_directions_are_compared_and_codes_have_unit_length():
    for kind in (CosineQuantizer, CosineGradientQuantizer):
        quantizer = kind(6, 32)
        z = latent(0, (2, 6, 4, 4))
        made, longer = quantizer.eval()(z), quantizer(z * 50)
        assert torch.equal(made.codes_BhwQ, longer.codes_BhwQ)
        torch.testing.assert_close(made.z_BDhw.norm(dim=1), torch.ones(2, 4, 4))


def test_cosine_by_gradient_is_the_published_formula():
    """LlamaGen: unit vectors on both sides; mean((e - sg z)²) and mean((sg e - z)²)."""
    quantizer = CosineGradientQuantizer(6, 32)
    weight = quantizer.book_parameter(0)
    weight.data.mul_(torch.rand(32, 1) + 0.5)  # no longer of unit length, as after a step
    z = latent(0, (2, 6, 4, 4)).requires_grad_()
    rows, book = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, 6), dim=1), F.normalize(weight, dim=1)
    indices = (rows @ book.T).argmax(1)
    made = quantizer(z)
    assert torch.equal(made.codes_BhwQ.flatten(), indices)
    torch.testing.assert_close(made.z_BDhw.permute(0, 2, 3, 1).reshape(-1, 6), book[indices])
    expected = (book[indices] - rows.detach()).square().mean() + (
        book[indices].detach() - rows
    ).square().mean()
    torch.testing.assert_close(sum(made.losses.values()), expected)
    theirs = torch.autograd.grad(expected, (z, weight))
    mine = torch.autograd.grad(sum(made.losses.values()), (z, weight))
    torch.testing.assert_close(mine, theirs)


def test_product_is_one_cosine_quantizer_for_each_chunk():
    product = ProductQuantizer(8, 16, 4)
    z = latent()
    made = product(z.requires_grad_())
    weights = torch.arange(8.0)[:, None, None]
    (made.z_BDhw * weights).sum().backward()
    losses = []
    for chunk in range(4):
        part = slice(2 * chunk, 2 * chunk + 2)
        alone, piece = CosineGradientQuantizer(2, 16), latent()[:, part].requires_grad_()
        alone.embeddings[0].data.copy_(product.embeddings[chunk])
        expected = alone(piece)
        (expected.z_BDhw * weights[part]).sum().backward()
        assert torch.equal(expected.codes_BhwQ[..., 0], made.codes_BhwQ[..., chunk])
        torch.testing.assert_close(expected.z_BDhw, made.z_BDhw[:, part])
        torch.testing.assert_close(piece.grad, z.grad[:, part])
        losses.append(expected.losses["codebook"])
    torch.testing.assert_close(torch.stack(losses).mean(), made.losses["codebook"])


def test_residual_depths_lower_the_error():
    quantizer = ResidualQuantizer(6, 64, 4)
    for _ in range(60):
        quantizer(torch.randn(8, 6, 4, 4))
    means = torch.stack([errors.mean() for _, errors in residuals(quantizer, torch.randn(8, 6, 4, 4))])
    assert bool((means[1:] < means[:-1]).all())


@pytest.mark.parametrize("name", LEARNED)
def test_the_walk_from_outside_finds_the_same_codes(quantizer):
    """`start`, `vectors`, `leave`: what re-initialisation and entropy rely on."""
    made = quantizer.eval()(latent())
    state = quantizer.start(latent())
    for depth in range(quantizer.depth):
        book = quantizer.codebook(quantizer.book_of(depth))
        indices = nearest_codes(quantizer.vectors(state, depth), book)
        assert torch.equal(indices, made.codes_BhwQ[..., depth].flatten())
        state = quantizer.leave(state, depth, indices)


# --- the library's other quantizers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LookupFreeQuantizer, BinarySphericalQuantizer])
def test_lookup_free_is_the_librarys_with_its_entropy(kind):
    quantizer = kind(4, 16, temperature=0.5)
    library = LFQ(dim=4, codebook_size=16, spherical=quantizer.spherical, commitment_loss_weight=1.0)
    z = latent(0, (2, 4, 3, 5))
    rows = z.flatten(2).transpose(1, 2)
    made = quantizer(z)
    (theirs, codes, _), parts = library(rows, inv_temperature=2.0, return_loss_breakdown=True)
    assert torch.equal(codes.flatten(), made.codes_BhwQ.flatten())
    torch.testing.assert_close(theirs.transpose(1, 2).reshape(z.shape), made.z_BDhw)
    torch.testing.assert_close(parts.commitment, made.losses["commitment"])
    # the library cuts probabilities off at 1e-5 under the logarithm
    expected = parts.per_sample_entropy - parts.batch_entropy
    torch.testing.assert_close(expected, made.losses["entropy"], atol=1e-3, rtol=1e-3)


def test_residual_lookup_free_is_the_librarys():
    torch.manual_seed(0)
    quantizer = LookupFreeQuantizer(8, 16, depth=3)
    library = ResidualLFQ(dim=8, codebook_size=16, num_quantizers=3)
    library.load_state_dict(quantizer.vq.state_dict())
    rows = latent().flatten(2).transpose(1, 2)
    theirs, codes, _ = library.eval()(rows)
    made = quantizer.eval()(latent())
    assert torch.equal(codes.reshape(made.codes_BhwQ.shape), made.codes_BhwQ)
    torch.testing.assert_close(theirs.transpose(1, 2).reshape(made.z_BDhw.shape), made.z_BDhw)
    torch.testing.assert_close(library.get_output_from_indices(codes), theirs)


def test_finite_scalar_is_the_published_rounding():
    """Mentzer et al. 2023, section 3: round(f(z)), f a tanh onto the levels; mixed-radix index."""
    levels = torch.tensor([8, 5, 5])
    quantizer = FiniteScalarQuantizer(3, [8, 5, 5])
    assert (quantizer.codebook_size, quantizer.depth) == (200, 1)
    z = latent(0, (2, 3, 3, 5), scale=3.0).double()
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    steps = (torch.tanh(rows + torch.atanh(offset / half)) * half - offset).round() + levels // 2
    expected = (steps * torch.tensor([1, 8, 40])).sum(1)
    assert torch.equal(quantizer(z.float()).codes_BhwQ.flatten(), expected.long())


def test_simvq_is_the_librarys_and_its_loss_has_two_names():
    quantizer = SimVQQuantizer(8, 16, rotation_trick=False)
    z = latent().requires_grad_()
    made = quantizer(z)
    quantizer.vq.input_to_quantize_commit_loss_weight = 0.25
    _, codes, loss = quantizer.vq(z.flatten(2).transpose(1, 2))
    assert torch.equal(codes.flatten(), made.codes_BhwQ.flatten())
    total = made.losses["codebook"] + 0.25 * made.losses["commitment"]
    torch.testing.assert_close(loss, total)
    wanted = (z, quantizer.vq.code_transform.weight)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(total, wanted))
    assert [name for name, _ in quantizer.named_parameters()] == ["vq.code_transform.weight"]


# --- Gumbel, IBQ, entropy ---------------------------------------------------------------------------------------


def test_gumbel_is_torchs_hard_sample_and_the_divergence_that_from_uniform(monkeypatch):
    quantizer = GumbelQuantizer(8, 16)
    quantizer.anneal(0.2)
    z = latent().requires_grad_()
    torch.manual_seed(5)
    made = quantizer(z)
    logits = quantizer.logits(z).permute(0, 2, 3, 1).reshape(-1, 16)
    torch.manual_seed(5)  # the same exponential draws
    hard = F.gumbel_softmax(logits, quantizer.temperature, hard=True)
    expected = hard @ quantizer.embedding.weight
    torch.testing.assert_close(made.z_BDhw.permute(0, 2, 3, 1).reshape(-1, 8), expected)
    assert torch.equal(made.codes_BhwQ.flatten(), hard.argmax(1))
    divergence = kl_divergence(Categorical(logits=logits), Categorical(logits=torch.zeros(16))).mean()
    torch.testing.assert_close(made.losses["divergence"], divergence)
    wanted = (z, quantizer.embedding.weight, quantizer.logits.weight)
    weights = latent(3)
    mine = torch.autograd.grad((made.z_BDhw * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights.permute(0, 2, 3, 1).reshape(-1, 8)).sum(), wanted)
    torch.testing.assert_close(mine, theirs)
    assert quantizer.logits.weight.grad is None
    assert (mine[2].flatten(1).norm(dim=1) > 0).all()  # every code learns


def test_gumbel_temperature_falls_along_a_half_cosine():
    quantizer = GumbelQuantizer(8, 16, start=1.0, end=0.2, until=0.5)
    seen = []
    for progress in (0.0, 0.25, 0.5, 0.8, 1.0):
        quantizer.anneal(progress)
        seen.append(quantizer.temperature)
    assert seen == pytest.approx([1.0, 0.6, 0.2, 0.2, 0.2])


def test_gumbel_in_eval_takes_the_best_code_without_noise(monkeypatch):
    monkeypatch.setattr(gumbel, "gumbel_noise", None)
    quantizer = GumbelQuantizer(8, 16).eval()
    made = quantizer(latent())
    assert torch.equal(made.codes_BhwQ[..., 0], quantizer.logits(latent()).argmax(1))


def test_ibq_is_the_published_formula_with_a_gradient_for_every_code():
    """Shi et al. 2024: h = onehot + p - sg[p], z_q = h·E, with the N×K matrix written out."""
    quantizer = IndexBackpropagationQuantizer(8, 16, temperature=0.5)
    z = latent().requires_grad_()
    made = quantizer(z)
    x, book = z.permute(0, 2, 3, 1).reshape(-1, 8), quantizer.embedding.weight
    p = (x @ book.T).softmax(1)
    onehot = F.one_hot(p.argmax(1), 16).float()
    z_q, e = (onehot + p - p.detach()) @ book, onehot @ book
    q = (x @ book.T / 0.5).softmax(1)
    expected = {
        "soft": (z_q - x).square().mean(),
        "commitment": (e.detach() - x).square().mean(),
        "codebook": (e - x.detach()).square().mean(),
        "entropy": Categorical(q).entropy().mean() - Categorical(q.mean(0)).entropy(),
    }
    torch.testing.assert_close(made.losses, expected)
    weights = latent(3)
    (soft,) = torch.autograd.grad(made.losses["soft"], book, retain_graph=True)
    outputs = [(made.z_BDhw * weights).sum(), (z_q * weights.permute(0, 2, 3, 1).reshape(-1, 8)).sum()]
    for mine, theirs in zip(
        [outputs[0], *made.losses.values()], [outputs[1], *expected.values()], strict=True
    ):
        kwargs = {"retain_graph": True, "allow_unused": True}
        mine, theirs = (torch.autograd.grad(each, (z, book), **kwargs) for each in (mine, theirs))
        torch.testing.assert_close(mine, theirs)
    assert (soft.norm(dim=1) > 0).all()


def test_entropy_penalty_against_torch_distributions_in_float64():
    logits = 3 * torch.randn(40, 12, dtype=torch.float64)
    p = Categorical(logits=logits)
    expected = p.entropy().mean() - 0.7 * Categorical(p.probs.mean(0)).entropy()
    torch.testing.assert_close(entropy_penalty(logits, 0.7), expected)


def test_entropy_penalty_has_a_finite_gradient_where_probabilities_vanish():
    logits = torch.tensor([[1e4, 0.0, -1e4]] * 3, requires_grad=True)
    entropy_penalty(logits).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_sample_is_of_distinct_rows_and_all_of_a_few():
    x = torch.arange(50.0)[:, None]
    assert torch.equal(sample(x, 50), x)
    assert len(torch.unique(sample(x, 20))) == 20


def entropy_of(quantizer, z, **options):
    made = Reconstruction(torch.zeros(1), quantizer(z), z, quantizer)
    return Entropy(weight=2.0, **options)(None, made)


def test_entropy_of_learned_codebooks_by_depth():
    quantizer = GradientQuantizer(6, 16, 2).eval()
    z = latent(0, (2, 6, 4, 4))
    state, expected = z.permute(0, 2, 3, 1).reshape(-1, 6), []
    for book in quantizer.embeddings:
        distances = torch.cdist(state.double(), book.double()).square()
        p = Categorical(logits=-distances / 0.3)
        expected.append(p.entropy().mean() - Categorical(p.probs.mean(0)).entropy())
        state = state - book[distances.argmin(1)]
    made = entropy_of(quantizer, z, temperature=0.3)
    torch.testing.assert_close(made, 2 * torch.stack(expected).mean().float(), atol=1e-5, rtol=1e-4)


def test_entropy_prefers_sure_choices_of_all_codes():
    quantizer = ResidualQuantizer(2, 2).eval()
    quantizer.replace_codes(0, torch.arange(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    even = torch.tensor([[[[1.0, -1.0]], [[0.0, 0.0]]]])  # one vector on each code
    assert float(entropy_of(quantizer, even)) == pytest.approx(-2 * 0.6931, abs=1e-3)
    one = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
    assert float(entropy_of(quantizer, one)) == pytest.approx(0, abs=1e-3)
    between = torch.zeros(1, 2, 1, 2)
    assert float(entropy_of(quantizer, between)) == pytest.approx(0, abs=1e-3)


def test_entropy_needs_a_learned_codebook():
    parts = {"channels": [8], "latent_dim": 8, "blocks": 1, "patch": 4}
    for quantizer, hint in (
        (FiniteScalarQuantizer(8, [5, 5]), "not Finite"),
        (LookupFreeQuantizer(8, 16), "term"),
    ):
        tokenizer = ImageTokenizer(ConvEncoder(**parts), quantizer, ConvDecoder(**parts), 16)
        with pytest.raises(ConfigError, match=hint):
            Entropy().check(tokenizer)


# --- nearest codes, the null member, refusals ---------------------------------------------------------------------


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


def test_the_null_member_passes_the_latent_and_has_no_codes():
    z = torch.randn(1, 4, 2, 2)
    made = NoQuantizer(4)(z)
    assert made.codes_BhwQ is None
    assert torch.equal(made.z_BDhw, z)
    with pytest.raises(ValueError, match="no codes"):
        NoQuantizer(4).lookup(torch.zeros(1, 2, 2, 1, dtype=torch.int64))


def test_check_codes_refuses_floats():
    with pytest.raises(ValueError, match="integers"):
        check_codes(torch.zeros(1, 2, 2, 3), 3, 8)


@pytest.mark.parametrize(
    "kind, options, said",
    [
        (ResidualQuantizer, {"dim": 0}, "dim=0"),
        (ResidualQuantizer, {"depth": 0}, "depth=0"),
        (ResidualQuantizer, {"codebook_size": 1}, "codebook_size=1"),
        (ResidualQuantizer, {"decay": 1.0}, "decay=1"),
        (ResidualQuantizer, {"depth": 2, "least_depth": 3}, "least_depth=3"),
        (GradientQuantizer, {"least_depth": 0}, "least_depth=0"),
        (ProductQuantizer, {"depth": 3}, "depth=3"),
        (SimVQQuantizer, {"codebook_size": 0}, "codebook_size=0"),
        (LookupFreeQuantizer, {"codebook_size": 12}, "8 or 16"),
        (LookupFreeQuantizer, {"temperature": 0}, "temperature=0"),
        (BinarySphericalQuantizer, {"positions": 0}, "positions=0"),
        (FiniteScalarQuantizer, {"levels": [5, 2]}, "levels"),
        (ResidualFiniteScalarQuantizer, {"levels": [], "depth": 2}, "levels"),
        (GumbelQuantizer, {"end": 2.0}, "end=2"),
        (GumbelQuantizer, {"until": 0.0}, "until=0"),
        (IndexBackpropagationQuantizer, {"temperature": 0.0}, "temperature=0"),
    ],
)
def test_impossible_settings_are_refused(kind, options, said):
    sizes = {"dim": 4} if "levels" in options else {"dim": 4, "codebook_size": 8}
    with pytest.raises(ValueError, match=said):
        kind(**{**sizes, **options})
