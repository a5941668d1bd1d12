"""Models whose parameters lie in parts on several ranks: how they are parted, read, saved and put together again.

PyTorch's fully sharded data parallelism (`torch.distributed.fsdp.fully_shard`, after ZeRO stage 3, Rajbhandari et al.
2019, arXiv 1910.02054): each rank holds some rows of each parameter, and so of its gradient and of what an optimizer
keeps of it. A unit (a layer, say) is gathered when it runs and parted again; what lies in no unit is gathered when a
step begins and stays whole until its backward pass is over. Knows neither learners nor what models compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from vqlm.errors import ConfigError
from vqlm.files import sha256
from vqlm.ranks import first_rank_has, rank, rank_count, sum_over_ranks

T = TypeVar("T")


def check_shards() -> None:
    """ConfigError where this PyTorch cannot part models as they are parted here."""
    from torch.distributed.fsdp import FSDPModule

    # ranks may hold unlike batches: without it one that has a picture and one that has none wait for each other
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"strategy=fsdp needs PyTorch 2.13 or newer, this is {torch.__version__}; strategy=ddp does not"
        )


def shard(
    model: nn.Module, units: Iterable[nn.Module], methods: Sequence[str], device: torch.device, bf16: bool
) -> None:
    """Part the parameters of a model over the ranks, in place: its modules stay, their parameters are others.

    Numbers are the first rank's, wherever others began with theirs.

    units: parts of the model that are gathered one at a time. methods: of the model, that read parameters outside of
    units; called with nothing else before them in a step. bf16: units are gathered in it (their parameters, gradients
    and optimizer states stay fp32); for what runs under autocast, which would else keep a copy of each weight.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(first_rank_has(tensor, device))
    mesh = init_device_mesh(device.type, (rank_count(),))
    single = MixedPrecisionPolicy()
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=half if bf16 else single)
    root: Any = fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=single)
    root.set_reduce_scatter_unused_params(True)
    root.run_whole = _call
    for name in (*methods, "run_whole"):
        register_fsdp_forward_method(root, name)


def run_whole(model: nn.Module, function: Callable[[], T]) -> T:
    """function(), which may read any parameter of the model, parted or not; called on all ranks."""
    parted: Any = model
    if not hasattr(model, "run_whole"):
        return function()
    try:
        return parted.run_whole(function)
    finally:
        parted.reshard()


def _call(function: Callable[[], T]) -> T:
    return function()


@contextmanager
def used_alone(model: nn.Module) -> Iterator[None]:
    """For the length of a backward pass: what no rank has used gets no gradient, as in a model that is not parted.

    Without it such a parameter would get a gradient of 0, and an optimizer would move it by its momentum. Units run in
    every step; this is for what lies in none.
    """
    if not hasattr(model, "run_whole"):
        yield
        return
    whole, used = list(model.parameters()), set()
    places = [n for n, p in enumerate(whole) if p.requires_grad and not isinstance(p, DTensor)]
    handles = [whole[n].register_post_accumulate_grad_hook(lambda _, n=n: used.add(n)) for n in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    parted = list(model.parameters())
    counts = sum_over_ranks(torch.tensor([float(n in used) for n in places], device=parted[0].device))
    for n, count in zip(places, counts.tolist(), strict=True):
        if not count:
            parted[n].grad = None


def forget_step(model: nn.Module) -> None:
    """After a forward pass without its backward pass: the parameters of a parted model are parted again."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()  # type: ignore[operator]


# --- tensors in parts -----------------------------------------------------------------------------------------------


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all numbers together, on every rank: parted gradients are one vector."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def held(tensor: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """A view of those of the rows start … stop - 1 that this rank holds; of a tensor that is whole: all of them."""
    if not isinstance(tensor, DTensor):
        return tensor if stop is None else tensor[start:stop]
    own = tensor.to_local()
    if stop is None:
        return own
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk parts them
    first = rows * tensor.device_mesh.get_local_rank()
    return own[max(0, start - first) : max(0, stop - first)]


def replace_parameters(
    optimizer: torch.optim.Optimizer, old: Sequence[Tensor], new: Sequence[Tensor]
) -> None:
    """Let an optimizer that has made no step yet train `new` in place of `old`."""
    places = {id(before): after for before, after in zip(old, new, strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [places.get(id(p), p) for p in group["params"]]


# --- a model that is whole again ------------------------------------------------------------------------------------


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have no numbers yet, for `fill`."""
    empty = {id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for p in model.parameters()}
    return deepcopy(model, empty)


@torch.no_grad()
def fill(plain: nn.Module, parted: nn.Module) -> None:
    """Give a model that `hollow` made the parameters and buffers of the parted one; the first rank's alone, on the CPU.

    Called on all ranks, which send their parts one parameter at a time.
    """
    parted.reshard()  # type: ignore[operator]
    for own, theirs in zip(plain.parameters(), parted.parameters(), strict=True):
        assert isinstance(theirs, DTensor)
        whole = theirs.full_tensor()
        if rank() == 0:
            own.data = whole.cpu()
    for own, theirs in zip(plain.buffers(), parted.buffers(), strict=True):
        own.copy_(theirs)


# --- files ----------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write each rank's parts into a file of its own (safetensors, by torch.distributed.checkpoint); their checksums.

    folder: empty, and the same for all ranks; called on all of them. OSError on each if one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    apart, seen = {}, set()
    for name, tensor in tensors.items():
        memory = held(tensor).data_ptr()
        apart[name] = (
            tensor.detach().clone() if memory in seen else tensor.detach()
        )  # tied: the format has no links
        seen.add(memory)
    try:
        with _alone_without_warning():
            save(apart, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # no Exception, and with a traceback of each rank in its text
        reasons = (f"process {number}: {failure[0]}" for number, failure in error.failures.items())
        raise OSError("; ".join(reasons)) from error
    return checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of parts; the ranks share the work, each gets all."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    own = {name: sha256(folder / name) for name in names[rank() :: rank_count()]}
    if rank_count() == 1:
        return own
    found: list[Any] = [None] * rank_count()
    dist.all_gather_object(found, own)
    return {name: digest for part in found for name, digest in part.items()}


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and number type of each tensor whose parts lie in the folder, by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (about.size, about.properties.dtype) for name, about in found.items()}


def read_shards(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors, parted over any number of ranks or whole, from files that any number of ranks wrote."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _alone_without_warning():
        load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=rank_count() == 1)


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to .* in a single process.*")
        yield


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a tensor that every rank has, parted as `like` is; unchanged if that is not parted."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
