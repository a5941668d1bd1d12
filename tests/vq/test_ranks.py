"""Several processes train one quantizer: they stay equal, and equal to one process that is fed all they are fed."""

import pytest
import torch
from on_ranks import make_model, make_models, run_on_ranks, train, train_all
from safetensors.torch import load_file
from tiny import small_quantizers

from vq.quantizers import gumbel

# Files that differ in sizes alone become one; a sharp temperature would enlarge rounding errors a hundredfold.
NODES = dict({str(node): (name, node) for name, node in small_quantizers().items()}.values())
NODES = {name: node | {"temperature": 0.5} if "temperature" in node else node for name, node in NODES.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has after some steps on half of each batch: tensors by name/key."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(train_all, folder, NODES, before=make_models)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("name", NODES)
def test_ranks_agree_with_each_other_and_with_one_process(name, ranks, monkeypatch):
    first, second = ({k: v for k, v in each.items() if k.startswith(f"{name}/")} for each in ranks)
    monkeypatch.setattr(gumbel, "gumbel_noise", gumbel.gumbel_noise)  # `train` puts its own there
    kept = first[f"{name}/kept"]
    alone = train(make_model(NODES[name]), 0, 1, kept if NODES[name].get("least_depth") else None)
    assert first.keys() == second.keys() == {f"{name}/{key}" for key in alone}
    for key, expected in alone.items():
        assert torch.equal(first[f"{name}/{key}"], second[f"{name}/{key}"]), key
        torch.testing.assert_close(first[f"{name}/{key}"], expected, atol=1e-6, rtol=0, msg=key)
