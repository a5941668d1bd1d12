"""Two processes whose unused codes are replaced together, for test_codebook.py: spawned functions are imported."""

STEPS, SHAPE = 9, (8, 8, 4, 4)


def make(policy, start):
    from vq.codebook import CodebookReset
    from vq.codebook import policies as family
    from vq.codebook import start as starts

    return CodebookReset(
        getattr(family, policy)(), getattr(starts, start)(), window=3, threshold=0.3, cooldown=0, seed=1
    )


def train_all(rank, world, folder, cases):
    """Each case on this rank's share of each batch; codebooks and the resets' state go to `folder`."""
    from safetensors.torch import save_file

    tensors = {}
    for name, (node, policy, start) in cases.items():
        for key, tensor in train(node, make(policy, start), rank, world).items():
            tensors[f"{name}/{key}"] = tensor.clone().contiguous()
    save_file(tensors, f"{folder}/rank-{rank}.safetensors")


def train(node, reset, rank, world):
    """State of quantizer and reset after STEPS batches; then after `finish`."""
    import torch
    from tiny import make_quantizer

    quantizer = make_quantizer(node)
    batches = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)) for step in range(STEPS)]
    for z in batches:
        mine = z.chunk(world)[rank]
        reset.observe(quantizer, mine, quantizer(mine).codes_BhwQ, 0.0)
    state = {key: value.clone() for key, value in quantizer.state_dict().items()}
    state |= {f"reset/{key}": value for key, value in reset.state_dict().items()}
    state["left"] = torch.tensor(reset.finish(quantizer, batches))
    return state | {f"finished/{key}": value for key, value in quantizer.state_dict().items()}
