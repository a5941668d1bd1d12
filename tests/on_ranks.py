"""Two processes that train quantizers together, for test_ranks.py: a spawned process must find its function by import.

Legend: B batch, D latent width, h w grid, N = B·h·w vectors.
"""

STEPS, SHAPE = 3, (4, 8, 2, 3)


def run_on_ranks(function, folder, *arguments, world=2, before=None):
    """Call function(rank, world, folder, *arguments) in `world` processes that know each other, and wait for them.

    before: arguments → what takes their place, called in each process before it knows the others, as a command builds
    its model before training begins.
    """
    from torch import multiprocessing

    multiprocessing.spawn(_join, (world, folder, function, arguments, before), nprocs=world)


def _join(rank, world, folder, function, arguments, before):
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    made = (before(*arguments),) if before else arguments
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        function(rank, world, folder, *made)
    finally:
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
