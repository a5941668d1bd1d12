"""Unused codes come back to life, stay alive, and nothing else is touched; at the end every code is used."""

from collections import Counter
from typing import Any

import pytest
import torch
from on_ranks import run_on_ranks
from resets_on_ranks import make, train, train_all
from safetensors.torch import load_file
from scipy.cluster.vq import kmeans2
from tiny import make_quantizer, small_quantizers
from vector_quantize_pytorch import VectorQuantize

from vq.codebook import EVIDENCE, CodebookReset, NoReset, count_codes, residuals
from vq.codebook.kmeans import count_uses, given, lloyd_round
from vq.codebook.policies import BatchRandom, ClosestAnchor, ErrorWeighted, SplitMostUsed, most_used
from vq.codebook.seen import draw, new_rows, see
from vq.codebook.start import BatchStart, KMeansStart, NoStart
from vq.quantizers import CodebookQuantizer
from vq.quantizers.nearest import nearest_codes
from vq.quantizers.residual import CosineQuantizer, GradientQuantizer, ResidualQuantizer

POLICIES = [BatchRandom, ErrorWeighted, SplitMostUsed, ClosestAnchor]
LEARNED = {
    str(node): node
    for node in small_quantizers().values()
    if isinstance(make_quantizer(node), CodebookQuantizer)
}


def collapsed(depth=2, size=32, dim=4):
    """All codes but one far away from the data: only one is ever chosen."""
    quantizer = ResidualQuantizer(dim, size, depth, decay=0.9)
    for d in range(depth):
        quantizer.replace_codes(d, torch.arange(1, size), torch.full((size - 1, dim), 100.0))
        quantizer.replace_codes(d, torch.tensor([0]), torch.zeros(1, dim))
    return quantizer


def latents(step, batch=16):
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(step))


def used(quantizer):
    codes = quantizer.eval()(latents(999, 64)).codes_BhwQ
    quantizer.train()
    return (count_codes(codes, quantizer.codebook_size) > 0).float().mean(1)


def run(quantizer, reset, steps, progress=0.0, first=0, batch=16):
    """Replacements of each batch."""
    found = []
    for step in range(first, first + steps):
        z = latents(step, batch)
        found.append(reset.observe(quantizer, z, quantizer(z).codes_BhwQ, progress))
    return found


def waiting(**options):
    """A reset that leaves the first codes as they are."""
    return CodebookReset(start=NoStart(), **options)


# --- revival ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore:after")
def test_each_policy_revives_a_collapsed_codebook(policy):
    quantizer = collapsed()
    run(quantizer, waiting(policy=policy(), window=5), 60)
    assert bool((used(quantizer) > 0.9).all())


def test_without_replacements_it_stays_collapsed():
    quantizer = collapsed()
    run(quantizer, NoReset(), 60)
    assert used(quantizer)[0] < 0.1


def test_a_collapse_is_said_once():
    with pytest.warns(UserWarning, match=r"codes in use are 3\.1 %, 3\.1 %") as caught:
        quantizer, reset = collapsed(), waiting(window=5, stop=0.5)
        run(quantizer, reset, 6)
        for d in range(2):
            quantizer.replace_codes(d, torch.arange(1, 32), torch.full((31, 4), 100.0))
        run(quantizer, reset, 6)
    assert len(caught) == 1


# --- the two churn traps ----------------------------------------------------------------------------------------------


def test_a_reset_survives_the_next_ema_step():
    # ml-4m and espnet wrote the embedding alone; the next EMA step restored the dead code from its old sums
    quantizer = collapsed()
    vector = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    quantizer.replace_codes(0, torch.tensor([7]), vector)
    quantizer.learn(0, torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    quantizer.settle([0])
    torch.testing.assert_close(quantizer.codebook(0)[7], vector[0], atol=2e-3, rtol=2e-3)


def library_replacements(threshold, steps, last):
    """Codes that the library replaces per step in the last steps: K=512, 256 vectors a batch. 1 is RQ-VAE's rule."""
    vq = VectorQuantize(4, codebook_size=512, decay=0.99, threshold_ema_dead_code=threshold)
    book: Any = vq._codebook
    counts, replace = [], book.replace

    def counted(x, batch_mask, **options):
        counts.append(int(batch_mask.sum()))
        replace(x, batch_mask=batch_mask, **options)

    book.replace = counted
    for step in range(steps):
        before = len(counts)
        vq(latents(step).permute(0, 2, 3, 1).reshape(1, -1, 4))
        counts += [0] * (before + 1 - len(counts))
    return sum(counts[-last:]) / last


def test_absolute_thresholds_churn_where_ours_settles():
    # a code of average use is chosen once in two batches: an EMA count of 1 or 2 is out of reach for most
    quantizer = ResidualQuantizer(4, 512, 1, decay=0.99)
    reset = CodebookReset(window=20)
    run(quantizer, reset, 80)
    ours = sum(sum(replaced) for replaced in run(quantizer, reset, 40, first=80)) / 40
    assert library_replacements(1, 120, 40) > 0.25 * 512
    assert library_replacements(2, 120, 40) > 0.5 * 512
    assert ours < 0.01 * 512


@pytest.mark.filterwarnings("ignore:after")
def test_a_window_goes_on_until_there_is_evidence():
    # 16 vectors, 64 codes: after 5 batches a quarter of all codes of average use has not been chosen, by chance
    quantizer, reset = ResidualQuantizer(4, 64, 1), waiting(window=5, threshold=0.5)
    replaced = run(quantizer, reset, 80, batch=1)
    ends = [n + 1 for n, each in enumerate(replaced) if each]
    assert ends == [EVIDENCE * 64 / 16, 2 * EVIDENCE * 64 / 16]


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:after")
def test_replacements_are_vectors_of_that_depth_and_distinct():
    quantizer, z = collapsed(), latents(0, 64)
    with torch.no_grad():
        replaced = waiting(window=1).observe(quantizer, z, quantizer.eval()(z).codes_BhwQ, 0.0)
    assert replaced == [31, 31]
    found = residuals(quantizer, z)
    for depth in range(2):
        rows = quantizer.codebook(depth)[1:]
        assert len(rows.unique(dim=0)) == 31
        assert bool((torch.cdist(rows.double(), found[depth][0].double()).amin(1) < 1e-6).all())


def test_draws_follow_the_weights():
    weights, random = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.Generator().manual_seed(0)
    x_ND = torch.arange(4.0)[:, None]
    first = Counter(int(draw(x_ND, weights, 1, random)) for _ in range(1000))
    assert first[0] == 0
    assert [first[n] / 1000 for n in (1, 2, 3)] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.05)
    assert sorted(draw(x_ND, weights, 9, random).flatten().tolist()) == [1, 2, 3]


def test_equal_vectors_are_drawn_once():
    x_ND = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    assert new_rows(x_ND).tolist() == [True, True, False, False]
    assert len(draw(x_ND, torch.ones(4), 4, torch.Generator())) == 2


@pytest.mark.parametrize("policy", [BatchRandom(), ErrorWeighted(power=0.0), SplitMostUsed()])
def test_vectors_that_are_codes_already_are_not_drawn(policy):
    quantizer = ResidualQuantizer(4, 8, 1)
    quantizer.replace_codes(0, torch.arange(8), torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    z = quantizer.codebook(0)[torch.arange(16) % 8].T.reshape(1, 4, 4, 4).clone()
    z[0, :, 0, 0] += 1e-6  # as far away as rounding
    indices, rows = policy.propose(looked_at(quantizer, z), torch.tensor([2, 3]), torch.Generator())
    assert len(indices) == len(rows) == 0


def looked_at(quantizer, z):
    uses = count_codes(quantizer.eval()(z).codes_BhwQ, quantizer.codebook_size)
    return see(quantizer, quantizer.start(z), 0, uses[0], uses[0] / uses[0].sum())


def test_error_weighted_prefers_large_errors_and_batch_random_does_not():
    quantizer = ResidualQuantizer(4, 2, 1)
    quantizer.replace_codes(0, torch.arange(2), torch.zeros(2, 4))
    z = torch.cat([torch.randn(60, 4, 1, 4) * 0.1, torch.randn(4, 4, 1, 4) * 3])
    unused, far = torch.arange(12), {}
    for policy in (ErrorWeighted(power=1.0), BatchRandom()):
        _, rows = policy.propose(looked_at(quantizer, z), unused, torch.Generator().manual_seed(0))
        far[type(policy)] = int((rows.norm(dim=1) > 1).sum())
    assert far[ErrorWeighted] >= 10
    assert far[BatchRandom] <= 4


def test_the_most_used_codes_are_split_and_then_count_half():
    assert most_used(torch.tensor([1.0, 10.0, 4.0, 0.0]), 4).tolist() == [1, 1, 2, 1]
    assert most_used(torch.zeros(3), 2).tolist() == []
    quantizer = ResidualQuantizer(4, 8, 1)
    quantizer.replace_codes(0, torch.arange(8), torch.full((8, 4), 50.0))
    quantizer.replace_codes(0, torch.tensor([3]), torch.ones(1, 4))
    z = latents(0) * 2
    indices, rows = SplitMostUsed().propose(looked_at(quantizer, z), torch.tensor([0, 5]), torch.Generator())
    assert indices.tolist() == [0, 5]
    assert 0 < float((rows - 1).norm(dim=1).max()) < 2  # copies of code 3, with a noise below the spread of 2


def test_codes_whose_vectors_all_equal_them_are_not_split():
    quantizer = ResidualQuantizer(4, 8, 1)
    quantizer.replace_codes(0, torch.tensor([0]), torch.ones(1, 4))
    indices, _ = SplitMostUsed().propose(
        looked_at(quantizer, torch.ones(2, 4, 2, 2)), torch.tensor([5]), torch.Generator()
    )
    assert len(indices) == 0


def test_closest_anchor_is_the_formula():
    """Against a plain loop over codes, in float64."""
    quantizer = ResidualQuantizer(4, 16, 1)
    quantizer.replace_codes(0, torch.arange(16), torch.randn(16, 4) * 3)
    seen = looked_at(quantizer, latents(1))
    seen.shares_K = torch.linspace(0, 1e-3, 16)
    indices, rows = ClosestAnchor().propose(seen, torch.empty(0), torch.Generator().manual_seed(0))
    moved, compared = dict(zip(indices.tolist(), rows, strict=True)), 0
    taken = set()
    for k in range(16):
        alpha = float(torch.exp(-10 * 16 * seen.shares_K[k].double() / 0.01 - 1e-3))
        assert (k in moved) == (alpha > 0.01)
        nearest = int((seen.vectors_ND.double() - seen.book_KD[k].double()).square().sum(1).argmin())
        if k in moved and nearest not in taken:
            expected = (1 - alpha) * seen.book_KD[k] + alpha * seen.vectors_ND[nearest]
            torch.testing.assert_close(moved[k], expected)
            compared += 1
        taken.add(nearest)
    assert compared >= 3
    assert len(rows.unique(dim=0)) == len(rows)


# --- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:after")
def test_nothing_is_replaced_after_the_stop():
    quantizer, reset = collapsed(), waiting(window=1, stop=0.5)
    z = latents(0, 64)
    assert reset.observe(quantizer, z, quantizer(z).codes_BhwQ, 0.5) == []
    assert reset.observe(quantizer, z, quantizer(z).codes_BhwQ, 0.49) != []


@pytest.mark.filterwarnings("ignore:after")
def test_a_replaced_code_rests_for_the_cooldown():
    quantizer, reset = collapsed(), waiting(window=1, cooldown=2)
    z, one_code = latents(0, 64), torch.zeros(64, 4, 4, 2, dtype=torch.int64)
    counts = [sum(reset.observe(quantizer, z, one_code, 0.0)) for _ in range(4)]
    assert counts == [62, 0, 0, 62]


@pytest.mark.filterwarnings("ignore:after")
def test_left_out_depths_are_not_counted():
    quantizer, reset = ResidualQuantizer(4, 8, 3, least_depth=1), waiting(window=100)
    reset.observe(quantizer, latents(0), torch.zeros(16, 4, 4, 1, dtype=torch.int64), 0.0)
    codes = torch.full((16, 4, 4, 2), 3)
    codes[..., 1] = -1
    reset.observe(quantizer, latents(0), codes, 0.0)
    assert reset.state["counts"].sum(1).tolist() == [512, 0, 0]
    run(quantizer, reset, 3)


@pytest.mark.filterwarnings("ignore:after")
def test_depths_that_share_a_book_are_counted_and_looked_at_together():
    quantizer = ResidualQuantizer(4, 8, 3, shared=True)
    quantizer.replace_codes(0, torch.arange(8), torch.randn(8, 4))
    z, reset = latents(0), waiting(window=100)
    codes = quantizer.eval()(z).codes_BhwQ
    reset.observe(quantizer, z, codes, 0.0)
    assert torch.equal(reset.state["counts"], count_codes(codes, 8).sum(0, keepdim=True))
    seen = see(quantizer, quantizer.start(z), 0, reset.state["counts"][0], reset.state["shares"][0])
    assert torch.equal(seen.vectors_ND, torch.cat([x for x, _ in residuals(quantizer, z)]))


# --- the start --------------------------------------------------------------------------------------------------------


def test_the_first_batches_give_the_first_codes():
    quantizer, reset = ResidualQuantizer(4, 64, 2), CodebookReset(start=BatchStart(per_code=5.0))
    replaced = run(quantizer, reset, 2)
    assert replaced == [[], [64, 64]]  # 256 vectors are less than 5 for each of 64 codes, 512 are not
    rows = quantizer.codebook(0)
    given_ND = torch.cat([quantizer.start(latents(n)) for n in (0, 1)])
    assert bool((rows[:, None] == given_ND).all(-1).any(1).all())
    assert len(rows.unique(dim=0)) == 64


def test_lloyd_agrees_with_scipy():
    x_ND = torch.randn(3000, 4)
    quantizer = ResidualQuantizer(4, 8, 1)
    quantizer.replace_codes(0, torch.arange(8), x_ND[:8])
    for _ in range(5):
        lloyd_round(quantizer, 0, x_ND, 0.0, torch.Generator())
    expected, _ = kmeans2(x_ND.double().numpy(), x_ND[:8].double().numpy(), iter=5, minit="matrix")
    torch.testing.assert_close(quantizer.codebook(0).double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_k_means_starts_nearer_to_the_data_than_a_draw():
    errors = {}
    for start in (BatchStart(per_code=8.0), KMeansStart(per_code=8.0)):
        quantizer = ResidualQuantizer(4, 32, 2)
        run(quantizer, CodebookReset(start=start), 2)
        errors[type(start)] = [float(e.mean()) for _, e in residuals(quantizer, latents(0))]
    for drawn, means in zip(errors[BatchStart], errors[KMeansStart], strict=True):
        assert means < 0.85 * drawn


# --- after training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED, ids=lambda name: LEARNED[name]["_target_"].split(".")[-1])
def test_at_the_end_every_code_is_used_on_the_training_set(name):
    quantizer = make_quantizer(LEARNED[name]).eval()
    z = torch.randn(40, 8, 4, 4)
    for book in range(quantizer.books):  # most codes far away from anything
        K, D = quantizer.codebook(book).shape
        quantizer.replace_codes(book, torch.arange(2, K), 50 + torch.rand(K - 2, D))
    assert CodebookReset().finish(quantizer, [z[:7], z[7:]]) == [0] * quantizer.books
    codes = quantizer(z).codes_BhwQ
    for book in range(quantizer.books):
        mine = [d for d in range(quantizer.depth) if quantizer.book_of(d) == book]
        assert len(codes[..., mine].unique()) == quantizer.codebook_size


def test_rounds_after_training_make_errors_smaller_and_use_more_even():
    results = []
    for rounds in (0, 8):
        quantizer = ResidualQuantizer(4, 64, 1)
        # a heap of codes in the middle
        quantizer.replace_codes(0, torch.arange(64), torch.randn(64, 4, generator=torch.Generator()) * 0.3)
        z = latents(0, 256)
        assert CodebookReset(rounds=rounds).finish(quantizer, [z]) == [0]
        uses = count_uses(quantizer, quantizer.start(z))[0] / 4096
        entropy = -torch.special.xlogy(uses, uses).sum()
        results.append((float(residuals(quantizer, z)[0][1].mean()), float(entropy.exp()) / 64))
    (error, perplexity), (better, more) = results
    assert better < 0.85 * error
    assert more > perplexity and more > 0.8


def test_a_book_of_several_depths_is_filled_with_what_all_of_them_are_given():
    # one round of filling changes what the second depth is given: the book is looked at again until nothing is unused
    for seed in range(4):
        torch.manual_seed(seed)
        quantizer = ResidualQuantizer(4, 256, 3, shared=True)
        quantizer.replace_codes(0, torch.arange(256), torch.randn(256, 4) * torch.rand(256, 1) ** 4)
        assert CodebookReset(rounds=0).finish(quantizer, [latents(seed, 20)]) == [0]


def test_codes_in_use_stay_where_no_rounds_are_asked_for():
    quantizer, z = collapsed(depth=3), latents(1, 64)
    before = [quantizer.codebook(d)[0].clone() for d in range(3)]
    assert CodebookReset(rounds=0).finish(quantizer, [z]) == [0, 0, 0]
    assert torch.equal(quantizer.codebook(0)[0], before[0])


def test_fewer_vectors_than_codes_leave_codes_unused_and_say_how_many():
    quantizer = ResidualQuantizer(4, 64, 1)
    with pytest.warns(UserWarning, match=r"14\.1 % of the 64 codes.*9 latent vectors have 9 distinct"):
        (left,) = CodebookReset().finish(quantizer, [torch.randn(1, 4, 3, 3)])
    assert left == 64 - 9


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore:after")
def test_constant_pictures_and_batches_smaller_than_the_codebook(policy):
    quantizer, reset = ResidualQuantizer(4, 64, 2), CodebookReset(policy(), window=2)
    z = torch.ones(1, 4, 2, 2)
    for _ in range(180):
        reset.observe(quantizer, z, quantizer(z).codes_BhwQ, 0.0)
    with pytest.warns(UserWarning, match=r"1\.6 %.* of the 64 codes.*4 latent vectors have 1 distinct"):
        assert reset.finish(quantizer, [z])[0] == 63
    assert bool(quantizer.codebook(0).isfinite().all())
    assert float(residuals(quantizer, z)[1][1].max()) < 1e-4


# --- optimizers, ranks, resumed runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.filterwarnings("ignore:after")
def test_moments_of_replaced_codes_are_cleared_and_no_others(shared):
    quantizer = GradientQuantizer(4, 16, 2, shared=shared)
    for book in range(quantizer.books):
        quantizer.replace_codes(book, torch.arange(16), torch.randn(16, 4))
        quantizer.replace_codes(book, torch.arange(12, 16), torch.full((4, 4), 90.0))
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-3)
    z = latents(0, 64)
    made = quantizer(z)
    made.losses["codebook"].backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(2.0)
        state["exp_avg_sq"].fill_(3.0)
    waiting(window=1, threshold=0.1).observe(quantizer, z, made.codes_BhwQ, 0.0, optimizer)
    for book in range(quantizer.books):
        state = optimizer.state[quantizer.book_parameter(book)]
        replaced = (state["exp_avg"] == 0).all(1)
        assert bool(replaced[12:].all()) and not bool(replaced[:8].all())
        assert torch.equal(replaced, (state["exp_avg_sq"] == 0).all(1))
        assert float(state["exp_avg"][~replaced].unique()) == 2.0
        assert float(state["step"]) == 1.0


RANK_CASES = {
    f"{policy}-{start}-{number}": (node, policy, start)
    for number, node in enumerate(
        [
            {
                "_target_": "vq.quantizers.residual.ResidualQuantizer",
                "dim": 8,
                "codebook_size": 24,
                "depth": 2,
            },
            {
                "_target_": "vq.quantizers.residual.CosineQuantizer",
                "dim": 8,
                "codebook_size": 24,
                "depth": 2,
                "shared": True,
            },
        ]
    )
    for policy, start in [
        ("BatchRandom", "BatchStart"),
        ("ErrorWeighted", "KMeansStart"),
        ("SplitMostUsed", "NoStart"),
        ("ClosestAnchor", "NoStart"),
    ]
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(train_all, folder, RANK_CASES)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("name", RANK_CASES)
@pytest.mark.filterwarnings("ignore:after")
def test_ranks_replace_the_same_codes_as_one_process(name, ranks):
    node, policy, start = RANK_CASES[name]
    alone = train(node, make(policy, start), 0, 1)
    for key, expected in alone.items():
        first, second = (rank[f"{name}/{key}"] for rank in ranks)
        assert torch.equal(first, second), key
        torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("start", [BatchStart, KMeansStart, NoStart])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore:after")
def test_a_resumed_reset_goes_on_as_the_uninterrupted_one(policy, start):
    def fresh():
        options = (
            {} if start is NoStart else {"per_code": 40.0}
        )  # three batches, the second of them before the end
        return CodebookReset(policy(), start(**options), window=2, threshold=0.3)

    for stopped_at in (2, 7):
        whole, parts = collapsed(), collapsed()
        run(whole, fresh(), 12)
        first, second = fresh(), fresh()
        run(parts, first, stopped_at)
        second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
        run(parts, second, 12 - stopped_at, first=stopped_at)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, parts.state_dict()[name]), name


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (CodebookReset, {"window": 0}),
        (CodebookReset, {"threshold": 1.0}),
        (CodebookReset, {"stop": 1.5}),
        (CodebookReset, {"cooldown": -1}),
        (CodebookReset, {"rounds": -1}),
        (ErrorWeighted, {"power": -1.0}),
        (SplitMostUsed, {"noise": 0.0}),
        (ClosestAnchor, {"strength": 0.0}),
        (ClosestAnchor, {"memory": 1.0}),
        (BatchStart, {"per_code": 0.5}),
        (KMeansStart, {"most_batches": 0}),
        (KMeansStart, {"rounds": 0}),
    ],
)
def test_impossible_settings_are_refused(made, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        made(**options)


def test_what_a_book_is_given_is_what_its_codes_are_chosen_by():
    quantizer = CosineQuantizer(4, 8, 3, shared=True)
    quantizer.replace_codes(0, torch.arange(8), torch.randn(8, 4))
    z = latents(0)
    codes = quantizer.eval()(z).codes_BhwQ
    chosen = nearest_codes(given(quantizer, quantizer.start(z), 0), quantizer.codebook(0))
    assert torch.equal(chosen.reshape(3, -1).T, codes.reshape(-1, 3))
