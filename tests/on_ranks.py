"""Processes that train together, for tests of several ranks: a spawned process must find its function by import.

Legend: B batch, D latent width, h w grid, N = B·h·w vectors.
"""

STEPS, SHAPE = 3, (4, 8, 2, 3)


def run_on_ranks(function, folder, *arguments, world=2, before=None):
    """Call function(rank, world, folder, *arguments) in `world` processes that know each other, and wait for them.

    before: arguments → what takes their place, called in each process before it knows the others, as a command builds
    its model before training begins.
    """
    from torch import multiprocessing

    multiprocessing.set_forkserver_preload(
        ["lightning", "transformers", "torch.distributed.fsdp"]
    )  # once for all
    given = (world, folder, function, arguments, before)
    multiprocessing.start_processes(_join, given, nprocs=world, start_method="forkserver")


def _join(rank, world, folder, function, arguments, before):
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    made = (before(*arguments),) if before else arguments
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        function(rank, world, folder, *made)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def make_models(nodes):
    return {name: make_model(node) for name, node in nodes.items()}


def make_model(node):
    """A quantizer behind a convolution that stands for an encoder."""
    from tiny import make_quantizer
    from torch import nn

    return nn.ModuleDict({"quantizer": make_quantizer(node), "encoder": nn.Conv2d(SHAPE[1], SHAPE[1], 1)})


def train_all(rank, world, folder, models):
    """Train each model on this rank's share of each batch; leave weights and buffers in `folder`."""
    from safetensors.torch import save_file

    tensors = {}
    for name, model in models.items():
        for key, tensor in train(model, rank, world).items():
            tensors[f"{name}/{key}"] = tensor.clone().contiguous()
    save_file(tensors, f"{folder}/rank-{rank}.safetensors")


def train(model, rank, world, kept=None):
    """State after STEPS steps of SGD with gradients averaged over ranks, and how many depths each step kept.

    kept: depths to keep, step by step, in place of a draw.
    """
    import torch
    from torch.nn import functional as F

    from vq.quantizers import gumbel

    quantizer = model["quantizer"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(100 + rank)  # from here on ranks draw differently
    depths = []
    for step in range(STEPS):
        if kept is not None:
            quantizer._draw_depth = lambda device, step=step: int(kept[step])
        everything = torch.Generator().manual_seed(step)
        z = model["encoder"](torch.randn(SHAPE, generator=everything).chunk(world)[rank])
        target = torch.randn(SHAPE, generator=everything).chunk(world)[rank]
        gumbel.gumbel_noise = lambda like, random=everything: noise(like, random, rank, world)
        quantizer.anneal(step / STEPS)
        made = quantizer(z)
        loss = F.mse_loss(made.z_BDhw, target) + sum(made.losses.values())
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, world)
        optimizer.step()
        depths.append(0 if made.codes_BhwQ is None else made.codes_BhwQ.shape[-1])
    return model.state_dict() | {"kept": torch.tensor(depths)}


def noise(like_NK, random, rank, world):
    """This rank's rows of the Gumbel noise of the whole batch."""
    import torch

    whole = torch.empty(len(like_NK) * world, like_NK.shape[1]).exponential_(generator=random)
    return -whole.log().chunk(world)[rank]


def average_gradients(model, world):
    """What data-parallel training does between backward and step."""
    from vqlm.ranks import sum_over_ranks

    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = sum_over_ranks(parameter.grad) / world


# --- language models ------------------------------------------------------------------------------------------------

LM_BATCHES, LM_STOP = 6, 3


def make_lm_learner(batches=LM_BATCHES, head="layered", objective=None, held_rows=0, **options):
    import torch
    from tiny import make_model as make_lm

    from lm.learner import LMLearner
    from lm.objectives.next_token import NextToken
    from lm.tune import train_new_rows
    from vqlm.training import Budget

    model, _ = make_lm(head)
    if held_rows:
        model.requires_grad_(False)
        train_new_rows(model, held_rows)
    adam = lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)  # noqa: E731
    budget = Budget(batches=batches, warmup=2)
    return LMLearner(model.train(), objective or NextToken(z=1e-3), adam, budget, **options)


def make_documents(rank=0, ranks=1, seed=0):
    """total → batches of this rank. Texts are of unequal length, so that ranks hold unequal numbers of tokens."""
    import torch
    from tiny import make_format

    from lm.data import Pairs
    from lm.mixture import DocumentBatches, Mixture

    form = make_format()[0]
    codes = torch.randint(0, 16, (12, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    names = [str(i) for i in range(12)]
    captions = [tuple(range(i, 2 * i + 1)) for i in range(12)]
    pairs = Pairs(captions, codes, names, names, names)
    mixture = Mixture(text_to_image=0.5, image_to_text=0.5, noise=0.2)
    return lambda total: DocumentBatches(pairs, form, mixture, 6, 48, seed, total, rank=rank, ranks=ranks)


def make_text_documents(rank=0, ranks=1):
    """total → batches of 2 documents, of which none, one or both hold a picture."""
    from tiny import make_format

    from lm.mixture import DocumentBatches, Mixture

    mixture = Mixture(text_to_image=0.5, image_to_text=0.0, text=0.5)
    texts = [list(range(i, i + 5)) for i in range(20)]
    pairs = make_documents()(1).pairs
    given = (pairs, make_format()[0], mixture, 2, None, 0)
    return lambda total: DocumentBatches(*given, total, texts, rank=rank, ranks=ranks)


def train_lm(rank, world, folder):
    """One run, one that a signal to rank 1 alone stops and that goes on, and one that one process has begun.

    Their states in `folder`.
    """
    import os
    import signal
    from pathlib import Path

    import torch
    from safetensors.torch import save_file
    from tiny import Signalled

    from vqlm import training
    from vqlm.errors import Interrupted
    from vqlm.hardware import Hardware

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    training.leave = lambda: None  # the ranks stay together for the next run
    hardware = Hardware(torch.device("cpu"), "fp32", world, "ddp")
    folder, documents = Path(folder), make_documents(rank, world)
    stopped = lambda total: Signalled(documents(total), LM_STOP if rank == 1 else None)  # noqa: E731
    found = {}
    runs = (("whole", documents), ("parts", stopped), ("parts", documents), ("from-one", documents))
    for name, batches in runs:
        torch.manual_seed(rank)
        learner = make_lm_learner(average=0.5)
        try:
            training.fit(learner, batches, folder / name, hardware, "test")
        except Interrupted:
            assert learner.batches_seen == LM_STOP + 1
        tensors, data = learner.training_state()
        found |= {f"{name}/{k}": v.detach().clone().contiguous() for k, v in tensors.items()}
        found[f"{name}/samples"] = torch.tensor(data["counters"]["samples_seen"])
        found[f"{name}/signals"] = torch.tensor(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    save_file(found, str(folder / f"rank-{rank}.safetensors"))


def train_lm_killed(rank, world, folder, batches=LM_BATCHES, at=LM_STOP):
    """A run in `folder`/killed that saves after each batch; its last rank is killed while it reads batch `at`."""
    import os
    import signal
    from pathlib import Path

    import torch
    from tiny import Signalled

    from vqlm import training
    from vqlm.hardware import Hardware

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    documents = make_documents(rank, world)
    killed = lambda total: Signalled(documents(total), at if rank == world - 1 else None, signal.SIGKILL)  # noqa: E731
    hardware = Hardware(torch.device("cpu"), "fp32", world, "ddp" if world > 1 else "single")
    training.fit(
        make_lm_learner(batches, average=0.5),
        killed,
        Path(folder) / "killed",
        hardware,
        "test",
        checkpoint_minutes=1e-9,
    )


def continue_lm(rank, world, folder, name, batches):
    """The run `folder`/name, from its last checkpoint if it has one; its state in `folder`/name.safetensors."""
    import os
    from pathlib import Path

    import torch
    from safetensors.torch import save_file

    from vqlm import training
    from vqlm.hardware import Hardware

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in place.items()}
    training.leave = lambda: None
    learner = make_lm_learner(batches, average=0.5)
    hardware = Hardware(torch.device("cpu"), "fp32", world, "ddp")
    training.fit(learner, make_documents(rank, world), Path(folder) / name, hardware, "test")
    tensors = learner.training_state()[0]  # asks all ranks
    if rank == 0:
        kept = {k: v.detach().clone().contiguous() for k, v in tensors.items() if not k.startswith("random/")}
        save_file(kept, f"{folder}/{name}.safetensors")


# --- language models in parts ---------------------------------------------------------------------------------------


def train_parted(rank, world, folder):
    """As `train_lm` with parameters parted over the ranks, and from a checkpoint that one process left in `from-one`.

    What this rank held while it trained, in `folder`/rank-….json; the first rank's results, in `folder`/….safetensors.
    """
    import json
    import signal
    from pathlib import Path

    import torch
    from safetensors.torch import save_file
    from tiny import Signalled

    from vqlm import training
    from vqlm.errors import Interrupted
    from vqlm.hardware import Hardware

    training.leave = lambda: None  # the ranks stay together for the next run
    hardware = Hardware(torch.device("cpu"), "fp32", world, "fsdp")
    folder, documents, options = (
        Path(folder),
        make_documents(rank, world),
        {"average": 0.5, "recompute": True},
    )
    stopped = lambda total: Signalled(documents(total), LM_STOP if rank == 1 else None)  # noqa: E731
    seen = {}
    for name, batches, given in (
        ("whole", documents, options),
        ("parts", stopped, options),
        ("parts", documents, options),
        ("from-one", documents, options),
        ("bad", documents, {"objective": Spoiled(batch=2), "head": "depth_transformer"}),
        ("rows", documents, {"held_rows": 40}),
        ("texts", make_text_documents(rank, world), {"head": "depth_transformer"}),
    ):
        torch.manual_seed(rank)
        learner = make_lm_learner(**given)
        for parameter in learner.model.parameters():
            parameter.data += rank  # what the first one has counts
        look = look_at_run(make_documents()(1)[0])
        try:
            training.fit(learner, batches, folder / name, hardware, "test", callbacks=[look])
        except Interrupted:
            assert learner.batches_seen == LM_STOP + 1 and learner.sharded
            continue
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not learner.sharded
        seen[name] = look.seen | {"bad_batches": learner.bad_batches}
        if rank == 0:
            state = {k: v.detach().clone() for k, v in learner.result.state_dict().items()}
            save_file(state, str(folder / f"{name}.safetensors"))
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


class Spoiled:
    """An objective whose loss on one batch is not a number, on one rank alone."""

    def __init__(self, batch):
        from lm.objectives.next_token import NextToken

        self.usual, self.batch, self.count = NextToken(z=1e-3), batch, 0
        self.competitors = self.usual.competitors

    def losses(self, model, batch):
        from vqlm.ranks import rank, rank_count

        losses, logs = self.usual.losses(model, batch)
        self.count += 1
        if self.count == self.batch + 1 and rank() == rank_count() - 1:
            losses["text"] = losses["text"] * float("nan")
        return losses, logs


def look_at_run(batch):
    """A callback: what a rank holds after each step, and what the model computes when it runs outside of a step."""
    import lightning as L
    import torch

    from vqlm.shards import held

    class Look(L.Callback):
        def __init__(self):
            self.seen = {"logits": []}

        def on_train_batch_end(self, trainer, learner, *_):
            kept = [t for state in learner.optimizer.state.values() for t in state.values() if t.ndim]
            self.seen["held"] = sum(held(p).numel() for p in learner.result.parameters())
            self.seen["kept"] = sum(held(t).numel() for t in kept)
            ids_BT = batch.ids_BTW[:, :, 0].clamp(min=0)
            with torch.inference_mode():
                scores = learner.measured(lambda: learner.result.lm(input_ids=ids_BT).logits)
            self.seen["logits"].append(float(scores.double().square().mean()))

    return Look()
