"""Two processes hold one language model in parts: they train it as one process does, stop, go on and leave it whole."""

import json
import shutil

import pytest
import torch
from on_ranks import (
    LM_BATCHES,
    LM_STOP,
    Spoiled,
    look_at_run,
    make_documents,
    make_lm_learner,
    make_text_documents,
    run_on_ranks,
    train_parted,
)
from safetensors.torch import load_file
from tiny import Signalled, make_format

from vqlm.errors import ConfigError, Interrupted
from vqlm.hardware import Hardware
from vqlm.shards import write_shards
from vqlm.training import Checkpoints, fit, read_log

ALONE = Hardware(torch.device("cpu"), "fp32")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # sums over ranks are taken in another order


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of what two ranks left, and what each of them saw; `alone` in it: one process, the joined batch."""
    folder = tmp_path_factory.mktemp("parted")
    look = look_at_run(make_documents()(1)[0])
    alone = make_lm_learner(average=0.5)
    fit(alone, make_documents(), folder / "alone", ALONE, "test", callbacks=[look])
    with pytest.raises(Interrupted):
        stopped = lambda total: Signalled(make_documents()(total), LM_STOP)  # noqa: E731
        fit(make_lm_learner(average=0.5), stopped, folder / "from-one", ALONE, "test")
    run_on_ranks(train_parted, folder)
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return folder, alone, look.seen, seen


def result(folder, name):
    return load_file(folder / f"{name}.safetensors")


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_parted_ranks_are_one_process_with_the_joined_batch(runs):
    folder, alone, look, seen = runs
    assert_close(result(folder, "whole"), alone.result.state_dict())
    mine, theirs = read_log(folder / "alone" / "log.jsonl")[-1], read_log(folder / "whole" / "log.jsonl")[-1]
    names = ("loss", "text", "image", "z", "text_bits", "image_bits", "samples", "batch")
    for name in (*names, "grad_trunk", "grad_text_rows", "grad_image_rows", "grad_head"):
        assert theirs[name] == pytest.approx(mine[name], rel=1e-3), name
    for rank in seen:  # the average, run outside of a step
        assert rank["whole"]["logits"] == pytest.approx(look["logits"], rel=1e-4)


def test_each_rank_holds_half_of_parameters_and_optimizer_states(runs):
    *_, look, seen = runs
    for part in ("held", "kept"):
        ranks = [rank["whole"][part] for rank in seen]
        assert sum(ranks) == look[part] and max(ranks) < 0.55 * look[part]


def test_a_signal_to_one_rank_stops_all_and_they_go_on_to_the_bit(runs):
    folder, *_, seen = runs
    for tensors in zip(result(folder, "whole").values(), result(folder, "parts").values(), strict=True):
        assert torch.equal(*tensors)
    last = [Checkpoints(folder / name / "checkpoints").all()[-1] for name in ("whole", "parts")]
    for files in zip(*(sorted(path.glob("*.safetensors")) for path in last), strict=True):
        whole, parts = (load_file(file) for file in files)
        assert whole.keys() == parts.keys() and any(name.startswith("optimizer/") for name in whole)
        for name, tensor in whole.items():
            assert torch.equal(tensor, parts[name]), name
    counters = [json.loads((path / "state.json").read_text())["counters"] | {"seconds": 0} for path in last]
    assert counters[0] == counters[1]
    for rank in seen:
        assert rank["parts"]["logits"] == rank["whole"]["logits"][LM_STOP + 1 :]


def test_a_checkpoint_of_one_process_goes_on_in_two_parted_ones(runs):
    folder, alone, *_ = runs
    assert_close(result(folder, "from-one"), alone.result.state_dict())


def test_a_checkpoint_of_two_parted_ranks_goes_on_in_one_process(runs, tmp_path):
    folder, alone, *_ = runs
    go_on_alone(folder / "parts", tmp_path)
    learner = make_lm_learner(average=0.5)
    fit(learner, make_documents(), tmp_path, ALONE, "test")
    assert (tmp_path / "checkpoints" / "batch-00000006" / "state.safetensors").is_file()
    assert_close(learner.result.state_dict(), alone.result.state_dict())


def go_on_alone(run, target):
    """The first checkpoint of a run, as if it had ended there."""
    *_, last = Checkpoints(run / "checkpoints").all()
    shutil.copytree(run, target, dirs_exist_ok=True)
    shutil.rmtree(target / "checkpoints" / last.name)


def test_a_damaged_part_is_noticed_and_the_checkpoint_before_is_used(runs, tmp_path):
    folder, *_ = runs
    shutil.copytree(folder / "parts", tmp_path, dirs_exist_ok=True)
    first, last = Checkpoints(tmp_path / "checkpoints").all()
    file = sorted(last.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    learner = make_lm_learner(average=0.5)
    with pytest.warns(UserWarning, match="checksum"):
        assert Checkpoints(tmp_path / "checkpoints", {}).resume(learner) == first
    assert learner.batches_seen == LM_STOP + 1
    file.unlink()
    with pytest.warns(UserWarning, match="checksum"):
        assert Checkpoints(tmp_path / "checkpoints", {}).resume(make_lm_learner(average=0.5)) == first


def test_a_batch_that_one_rank_cannot_use_is_skipped_by_all(runs, tmp_path):
    folder, *_, seen = runs
    assert [rank["bad"]["bad_batches"] for rank in seen] == [1, 1]
    learner = make_lm_learner(objective=Spoiled(batch=2), head="depth_transformer")
    with pytest.warns(UserWarning, match="skipped"):
        fit(learner, make_documents(), tmp_path, ALONE, "test")
    assert_close(result(folder, "bad"), learner.result.state_dict())


def test_a_head_that_no_rank_uses_stays(runs, tmp_path):
    """On one rank alone a head is not used in some batches, on none in others."""
    folder, *_ = runs
    ranks, vocabulary = (
        [make_text_documents(rank, 2)(LM_BATCHES) for rank in range(2)],
        make_format()[0].vocabulary,
    )
    pictures = [
        [bool((batches[n].ids_BTW >= vocabulary.image_offset).any()) for batches in ranks]
        for n in range(LM_BATCHES)
    ]
    assert [False, False] in pictures[1:] and any(a != b for a, b in pictures)
    learner = make_lm_learner(head="depth_transformer")
    fit(learner, make_text_documents(), tmp_path, ALONE, "test")
    assert_close(result(folder, "texts"), learner.result.state_dict())


def test_rows_that_came_with_a_model_stay_to_the_bit(runs, tmp_path):
    folder, *_ = runs
    learner = make_lm_learner(held_rows=40)
    before = learner.model.lm.get_input_embeddings().weight.detach().clone()
    fit(learner, make_documents(), tmp_path, ALONE, "test")
    found = result(folder, "rows")
    assert_close(found, learner.result.state_dict())
    after = found["lm.lm_head.weight"]
    assert torch.equal(after[:40], before[:40]) and not torch.equal(after[40:], before[40:])


def test_a_file_of_parts_that_cannot_be_written_is_an_error_of_its_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"process 0: .*file"):
        write_shards(tmp_path / "file" / "folder", {"x": torch.ones(3)})


def test_what_cannot_be_parted_is_refused(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    from vqlm.hardware import detect

    assert detect("cpu", "fp32", devices=2, strategy="fsdp").strategy == "fsdp"
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(ConfigError, match=r"strategy=fsdp needs PyTorch 2\.13"):
        detect("cpu", "fp32", devices=2, strategy="fsdp")
