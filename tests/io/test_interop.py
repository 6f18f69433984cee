"""Compressed weights in torch's own ways of storing and loading: pickles, state dicts, DCP, FSDP, DDP."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import s3tensor as s3
from s3tensor import StructuredSparseTensor
from s3tensor.io.state import flatten_state, unflatten_state

TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])
PATTERNS = ("2:4", "4:8", "rowpair16", "coupled2:4", "block:4x4@0.5", "unstructured@0.3")


def make(
    pattern: str = "2:4", shape: tuple[int, int] = (32, 64), seed: int = 0
) -> StructuredSparseTensor:
    generator = torch.Generator().manual_seed(seed)
    return StructuredSparseTensor.from_dense(torch.randn(shape, generator=generator), pattern)


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def model(seed: int, pattern: str | None = "2:4") -> nn.Sequential:
    """Two linears, the first compressed; seeds give different values."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    if pattern is not None:
        made[0].weight = frozen(StructuredSparseTensor.from_dense(made[0].weight, pattern))
    return made


def assert_same(left: nn.Module, right: nn.Module) -> None:
    """The same kinds of parameters with the same values."""
    first, second = left.state_dict(), right.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert type(tensor) is type(second[name])
        assert torch.equal(tensor, second[name]), name


# torch.save and torch.load ----------------------------------------------------------------------------


def stored(folder: Path, value: Any) -> Path:
    path = folder / "state.pt"
    torch.save(value, path)
    return path


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_torch_saves_it_loads(tmp_path: Path, pattern: str, transposed: bool) -> None:
    weight = make(pattern).bfloat16()
    weight = weight.t() if transposed else weight
    path = stored(tmp_path, weight)
    for options in ({}, {"mmap": True}, {"map_location": "cpu"}, {"map_location": lambda s, _: s}):
        found = torch.load(path, weights_only=True, **options)
        assert isinstance(found, StructuredSparseTensor)
        assert found.same_layout(weight) and str(found.pattern) == pattern
        assert torch.equal(found.packed, weight.packed)
        assert torch.equal(found.indices, weight.indices)


@pytest.mark.parametrize("place", ["meta", torch.device("meta"), {"cpu": "meta"}], ids=str)
@pytest.mark.parametrize("mmap", [False, True])
def test_map_location_moves_the_parts_with_the_weight(
    tmp_path: Path, place: Any, mmap: bool
) -> None:
    path = stored(tmp_path, {"w": make(), "b": torch.zeros(3)})
    found = torch.load(path, weights_only=True, map_location=place, mmap=mmap)["w"]
    assert isinstance(found, StructuredSparseTensor) and found.same_layout(make())
    assert {found.device.type, found.packed.device.type, found.indices.device.type} == {"meta"}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells where memory comes from")
def test_mmap_leaves_the_parts_in_the_file(tmp_path: Path) -> None:
    path = stored(tmp_path, make())
    mapped = torch.load(path, weights_only=True, mmap=True)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str(path)]
    for part in (mapped.packed, mapped.indices):
        assert any(int(a, 16) <= part.data_ptr() < int(b, 16) for a, b in ranges)
    x = torch.randn(3, 64)
    assert torch.equal(F.linear(x, mapped), F.linear(x, make()))


def test_a_weight_sent_to_another_process_shares_its_memory() -> None:
    weight = make().share_memory_()
    sent = ForkingPickler.loads(ForkingPickler.dumps(weight))
    assert torch.equal(sent, weight)
    weight.packed.zero_()
    assert torch.equal(sent, weight)


def test_parameters_ties_gradients_and_attributes_survive(tmp_path: Path) -> None:
    weight = nn.Parameter(make())
    weight.note = "mine"
    state = {"a": weight, "b": weight, "view": weight.detach().t(), "frozen": frozen(make())}
    found = torch.load(stored(tmp_path, state), weights_only=True)
    assert found["a"] is found["b"]
    assert isinstance(found["a"], nn.Parameter) and found["a"].requires_grad
    assert isinstance(found["frozen"], nn.Parameter) and not found["frozen"].requires_grad
    assert found["a"].note == "mine"
    assert not isinstance(found["view"], nn.Parameter)
    assert found["view"].packed.data_ptr() == found["a"].packed.data_ptr()  # stored once


def test_copies_for_speed_are_made_anew_and_not_stored(tmp_path: Path) -> None:
    lean = make(shape=(64, 256))
    fast = lean.with_memory("fast")
    assert fast.memory == "fast"
    assert stored(tmp_path, fast).stat().st_size < lean.nbytes_compressed + 4096
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert found.memory == "fast" and torch.equal(found.dense, lean.to_dense())
    found = torch.load(tmp_path / "state.pt", weights_only=True, map_location="meta")
    assert found.is_meta and found.packed.is_meta
    assert copy.copy(fast).memory == copy.deepcopy(fast).memory == "fast"


def test_copy_shares_the_values_and_keeps_what_the_tensor_is() -> None:
    weight = nn.Parameter(make())
    weight.note = "mine"
    twin = copy.copy(weight)
    assert twin is not weight and isinstance(twin, nn.Parameter) and twin.requires_grad
    assert twin.note == "mine" and twin.packed.data_ptr() == weight.packed.data_ptr()


def rebuilt(weight: StructuredSparseTensor, **change: Any) -> Any:
    """What a pickle of this weight gives when some of its arguments are forged."""
    rebuild, arguments = weight.__reduce_ex__(2)
    names = ("packed", "indices", "description", "memory", "requires_grad", "more")
    return rebuild(*{**dict(zip(names, arguments, strict=True)), **change}.values())


def described(**change: Any) -> dict[str, Any]:
    return {"description": {**make().description(), **change}}


@pytest.mark.parametrize(
    "change",
    [
        {"indices": torch.zeros(256, dtype=torch.uint8)},
        {"indices": torch.full((256,), 255, dtype=torch.uint8)},
        {"indices": torch.zeros(255, dtype=torch.uint8)},
        {"indices": "text"},
        {"packed": torch.zeros(512, 2, 1, dtype=torch.int8)},
        {"packed": torch.zeros(511, 2, 1)},
        {"packed": torch.zeros(1).expand(512, 2, 1)},
        {"packed": torch.zeros(512, 2, 1).to_sparse()},
        {"packed": None},
        {"packed": make()},
        described(shape=[32, 2**62]),
        described(shape=[32, 2**39]),
        described(shape=[64, 32, 1]),
        described(shape=None),
        described(pattern="1:4"),
        described(pattern="nonsense"),
        described(transposed="yes"),
        {"description": None},
        {"description": []},
        {"memory": "vast"},
        {"memory": []},
        {"requires_grad": 1},
        {"more": []},
        {"more": {"packed": torch.zeros(1)}},
        {"more": {"to_dense": 1}},
        {"more": {3: 1}},
    ],
    ids=repr,
)
def test_a_forged_pickle_is_refused(change: dict[str, Any]) -> None:
    weight = make()
    assert torch.equal(rebuilt(weight), weight)
    with pytest.raises(s3.CheckpointError) as refused:
        rebuilt(weight, **change)
    assert "pickled weight" in str(refused.value) and len(str(refused.value)) < 1000


def test_any_flip_of_a_byte_of_the_indices_is_a_sound_weight_or_a_refusal() -> None:
    weight = make("4:8", (8, 16))
    refused = 0
    for where in range(weight.indices.numel()):
        for bit in range(8):
            indices = weight.indices.clone()
            indices[where] ^= 1 << bit
            try:
                found = rebuilt(weight, indices=indices)
            except s3.CheckpointError:
                refused += 1
            else:
                assert s3.satisfies(found.to_dense(), "4:8")
    assert refused


class Forger:
    """Pickles as torch's own generic rebuild of a wrapper, with any state."""

    def __reduce__(self) -> Any:
        weight = make()
        state = {**vars(weight), "indices": torch.full((256,), 255, dtype=torch.uint8)}
        arguments = (
            *(StructuredSparseTensor, weight.dtype, tuple(weight.shape), weight.stride()),
            *(0, weight.layout, weight.device, False),
        )
        wrapper = torch._utils._rebuild_wrapper_subclass
        return torch._tensor._rebuild_from_type_v2, (
            *(wrapper, StructuredSparseTensor, arguments),
            state,
        )


def test_a_pickle_cannot_make_a_weight_around_the_checks(tmp_path: Path) -> None:
    path = stored(tmp_path, Forger())
    with pytest.raises(pickle.UnpicklingError, match="StructuredSparseTensor"):
        torch.load(path, weights_only=True)


FRESH = """
import sys, torch
import s3tensor
if sys.argv[2] == "first":
    s3tensor.StructuredSparseTensor
print(type(torch.load(sys.argv[1], weights_only=True)).__name__)
"""


@pytest.mark.parametrize("order", ["first", "never"])
def test_loading_needs_the_tensor_class_to_have_been_named(tmp_path: Path, order: str) -> None:
    """A plain ``import s3tensor`` loads no torch, so it cannot tell torch what is safe to load."""
    path = stored(tmp_path, make())
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(path), order], capture_output=True, text=True
    )
    if order == "first":
        assert done.stdout.strip() == "StructuredSparseTensor", done.stderr
    else:
        assert "s3tensor.tensor.rebuild" in done.stderr and done.returncode


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "rowpair16", "4:8"])
def test_a_file_of_a_gpu_is_read_on_a_cpu_and_back(tmp_path: Path, pattern: str) -> None:
    weight = make(pattern, (64, 128)).bfloat16()
    on_gpu = weight.cuda()  # in tile order there
    for source in (weight, on_gpu, on_gpu.with_memory("fast")):
        path = stored(tmp_path, source)
        found = torch.load(path, weights_only=True, map_location="cpu")
        assert found.same_layout(weight) and torch.equal(found.packed, weight.packed)
        found = torch.load(path, weights_only=True, map_location="cuda")
        assert found.same_layout(on_gpu) and torch.equal(found.packed, on_gpu.packed)
        assert found.indices.is_cuda and torch.equal(found.indices, on_gpu.indices)
    target = nn.Linear(128, 64, bias=False)
    target.weight = frozen(make(pattern, (64, 128), seed=1).bfloat16().cuda())
    tensors, description = flatten_state({"weight": on_gpu})
    target.load_state_dict(unflatten_state(tensors, description))
    assert torch.equal(target.weight.cpu(), weight)


# load_state_dict --------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["set", "swap"])
def swap(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways in which torch puts a new parameter into a module."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("swap")
class TestLoadStateDict:
    """From dense or sparse, to dense or sparse, copied or assigned."""

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("pattern", [None, "2:4"], ids=["dense", "sparse"])
    def test_the_same_kind_is_loaded(self, pattern: str | None, assign: bool) -> None:
        source, target = model(0, pattern), model(1, pattern)
        before = target[0].weight
        target.load_state_dict(source.state_dict(), assign=assign)
        assert_same(source, target)
        assert isinstance(target[0].weight, nn.Parameter)
        assert target[0].weight.requires_grad == before.requires_grad

    def test_sparse_copied_into_dense_is_refused(self) -> None:
        source, target = model(0), model(1, None)
        before = target[0].weight.detach().clone()
        with pytest.raises(RuntimeError, match=r"assign=True.*to_dense\(\)"):
            target.load_state_dict(source.state_dict())
        assert torch.equal(target[0].weight, before)

    def test_sparse_assigned_to_dense_makes_it_sparse(self) -> None:
        source, target = model(0), model(1, None)
        target.load_state_dict(source.state_dict(), assign=True)
        assert_same(source, target)

    def test_dense_copied_into_sparse_is_refused(self) -> None:
        source, target = model(0, None), model(1)
        before = target[0].weight.to_dense()
        with pytest.raises(RuntimeError, match="from_dense"):
            target.load_state_dict(source.state_dict())
        assert torch.equal(target[0].weight.to_dense(), before)

    def test_dense_assigned_to_sparse_makes_it_dense(self) -> None:
        source, target = model(0, None), model(1)
        target.load_state_dict(source.state_dict(), assign=True)
        assert_same(source, target)
        assert not isinstance(target[0].weight, StructuredSparseTensor)

    def test_another_pattern_is_refused_when_copied_and_taken_when_assigned(self) -> None:
        source, target = model(0, "1:4"), model(1)
        with pytest.raises(RuntimeError, match="patterns and shapes must be equal"):
            target.load_state_dict(source.state_dict())
        target.load_state_dict(source.state_dict(), assign=True)
        assert_same(source, target)


# flatten and unflatten --------------------------------------------------------------------------------


def test_a_flat_state_shares_memory_with_the_model_and_back() -> None:
    state = model(0).state_dict()
    tensors, description = flatten_state(state)
    assert set(tensors) == {"0.weight.packed", "0.weight.indices", "0.bias", "2.weight", "2.bias"}
    assert all(type(tensor) is Tensor for tensor in tensors.values())
    back = unflatten_state(tensors, description)
    assert set(back) == set(state)
    assert back["0.weight"].packed.data_ptr() == state["0.weight"].packed.data_ptr()
    assert torch.equal(back["0.weight"], state["0.weight"])


def test_a_flat_state_can_be_moved() -> None:
    tensors, description = flatten_state(model(0).state_dict(), device="meta")
    assert all(tensor.is_meta for tensor in tensors.values())
    back = unflatten_state(tensors, description)
    assert back["0.weight"].is_meta and back["0.weight"].same_layout(model(0)[0].weight)


# torch.distributed.checkpoint -------------------------------------------------------------------------


def assert_same_after_reading(folder: Path, source: nn.Module) -> None:
    """The flow of docs/interop.md for a folder of which nothing else is known."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else ""
        for name, entry in stored.items()
    }
    dcp.load(state, checkpoint_id=folder)
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    description = state.pop("s3tensor")
    target.load_state_dict(unflatten_state(state, description), assign=True)
    assert_same(source, target)


def test_dcp_of_a_flat_state_needs_no_model_to_be_read(tmp_path: Path) -> None:
    source = model(0)
    tensors, description = flatten_state(source.state_dict(), checksums=True)
    dcp.save({**tensors, "s3tensor": description}, checkpoint_id=tmp_path)
    assert_same_after_reading(tmp_path, source)


def test_dcp_of_a_flat_state_takes_what_it_holds_from_its_description(tmp_path: Path) -> None:
    """The target has other values and the pattern of the target has other positions."""
    source, target = model(0), model(1)
    tensors, description = flatten_state(source.state_dict())
    dcp.save({**tensors, "s3tensor": description}, checkpoint_id=tmp_path)
    tensors, description = flatten_state(target.state_dict())
    state = {**tensors, "s3tensor": description}
    dcp.load(state, checkpoint_id=tmp_path)
    description = state.pop("s3tensor")
    target.load_state_dict(unflatten_state(state, description), assign=True)
    assert_same(source, target)


def test_dcp_of_the_weights_themselves_fills_a_model_of_the_same_patterns(tmp_path: Path) -> None:
    source, target = model(0), model(1)
    dcp.save(source.state_dict(), checkpoint_id=tmp_path)
    dcp.load(target.state_dict(), checkpoint_id=tmp_path)
    assert_same(source, target)
    for other, message in ((model(1, "1:4"), "must be equal"), (model(1, None), "assign=True")):
        with pytest.raises(dcp.api.CheckpointException, match=message):
            dcp.load(other.state_dict(), checkpoint_id=tmp_path)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("flat", [False, True])
def test_asynchronous_dcp_saves_what_was_there(tmp_path: Path, flat: bool) -> None:
    if TORCH < (2, 7):
        pytest.skip("dcp.async_save copies no CPU tensor before torch 2.7")
    if TORCH < (2, 8) and not flat:
        pytest.skip(
            "dcp.async_save of torch 2.7 copies every tensor into a plain one: flatten first"
        )
    source, twin = model(0), model(0)
    tensors, description = flatten_state(source.state_dict())
    state = {**tensors, "s3tensor": description} if flat else source.state_dict()
    saving = dcp.async_save(state, checkpoint_id=tmp_path)
    with torch.no_grad():
        source[0].weight.packed.zero_()  # a step of training that does not wait
    saving.result()
    if flat:
        assert_same_after_reading(tmp_path, twin)
        return
    target = model(1)
    dcp.load(target.state_dict(), checkpoint_id=tmp_path)
    assert_same(twin, target)


TWO_RANKS = """
import sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from s3tensor import StructuredSparseTensor
from s3tensor.io.state import flatten_state, unflatten_state

folder, rank = sys.argv[1], int(sys.argv[2])
store = dist.FileStore(folder + "/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

def model(seed):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    weight = StructuredSparseTensor.from_dense(made[0].weight, "2:4")
    made[0].weight = nn.Parameter(weight, requires_grad=False)
    return made

def same(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(type(a) is type(b) and torch.equal(a, b) for a, b in pairs)

source = model(0)  # replicated: each rank holds all of it
tensors, description = flatten_state(source.state_dict(), checksums=True)
dcp.save({**tensors, "s3tensor": description}, checkpoint_id=folder + "/flat")
for written in ("flat", "alone"):  # by these two, and by one process before
    target = model(1 + rank)
    tensors, description = flatten_state(target.state_dict())
    state = {**tensors, "s3tensor": description}
    dcp.load(state, checkpoint_id=f"{folder}/{written}")
    description = state.pop("s3tensor")
    target.load_state_dict(unflatten_state(state, description), assign=True)
    assert same(source, target)

dcp.save(source.state_dict(), checkpoint_id=folder + "/whole")
target = model(1 + rank)
dcp.load(target.state_dict(), checkpoint_id=folder + "/whole")
assert same(source, target)
dist.barrier()
dist.destroy_process_group()
print("same")
"""


def in_two_ranks(script: str, folder: Path) -> None:
    """Run a script in two processes that find each other by a file; both must print ``same``."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            out, error = rank.communicate(timeout=120)
            assert rank.returncode == 0 and out.strip() == "same", error[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


def test_dcp_saves_and_loads_in_two_ranks_what_one_process_reads_and_wrote(tmp_path: Path) -> None:
    tensors, description = flatten_state(model(0).state_dict())
    state = {**tensors, "s3tensor": description}
    dcp.save(state, checkpoint_id=tmp_path / "alone")
    in_two_ranks(TWO_RANKS, tmp_path)
    assert_same_after_reading(tmp_path / "flat", model(0))


# what else torch.distributed does with a model --------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_state_dict_helpers_of_dcp_carry_compressed_weights(full: bool) -> None:
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    source, target = model(0), model(1)
    set_model_state_dict(target, get_model_state_dict(source, options=options))
    assert_same(source, target)


def data_parallel(module: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(module)


def fully_sharded(module: nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))


def sharded(module: nn.Module) -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(module[0].weight, dist.init_device_mesh("cpu", (1,)), [Shard(0)])


def broadcast(module: nn.Module) -> Any:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model(1), module.state_dict(), options=options)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "DDP": (data_parallel, "aten.view.default"),
    "FSDP2": (fully_sharded, "aten.split.Tensor"),
    "DTensor": (sharded, "aten.split.Tensor"),
    "broadcast": (broadcast, "c10d.broadcast_"),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", REFUSED)
def test_sharding_and_broadcasting_a_compressed_weight_are_refused_by_name(name: str) -> None:
    call, operator = REFUSED[name]
    with pytest.raises(s3.UnsupportedOpError, match=f"{operator}.*StructuredSparseTensor"):
        call(model(0))


@pytest.mark.usefixtures("one_rank")
def test_a_dtensor_is_compressed_by_its_local_part() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    dense = torch.randn(32, 64)
    shards = distribute_tensor(dense, dist.init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(s3.PatternError, match=r"DTensor.*to_local\(\)"):
        StructuredSparseTensor.from_dense(shards, "2:4")
    compressed = StructuredSparseTensor.from_dense(shards.to_local(), "2:4")
    assert torch.equal(compressed.to_dense(), dense * compressed.mask())


@pytest.mark.usefixtures("one_rank")
def test_data_parallel_trains_around_compressed_weights_that_it_ignores() -> None:
    source = model(0)
    names = [n for n, p in source.named_parameters() if isinstance(p, StructuredSparseTensor)]
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(source, names)
    x = torch.randn(5, 64)
    data_parallel(source)(x).square().sum().backward()
    alone = model(0)
    alone(x).square().sum().backward()
    assert torch.equal(source[2].weight.grad, alone[2].weight.grad)
    assert names == ["0.weight"] and source[0].weight.grad is None


FULLY_SHARDED = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrize import register_parametrization
import s3tensor as s3

folder, rank = sys.argv[1], int(sys.argv[2])
store = dist.FileStore(folder + "/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    register_parametrization(made[0], "weight", s3.S3Sparse("2:4", mode="ste"))
    return made

x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
alone, sharded = model(), model()
fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
outputs = [m(x) for m in (alone, sharded)]
for y in outputs:
    y.square().sum().backward()
torch.testing.assert_close(outputs[1], outputs[0])
for left, right in zip(alone.parameters(), sharded.parameters(), strict=True):
    assert right.to_local().numel() == left.numel() // 2
    torch.testing.assert_close(right.grad.full_tensor(), left.grad)
dist.barrier()
dist.destroy_process_group()
print("same")
"""


@pytest.mark.skipif(
    TORCH < (2, 8), reason="on CPUs FSDP2 of torch 2.6 has no streams, that of 2.7 sums gradients"
)
def test_fsdp2_shards_the_dense_weight_of_a_layer_in_training(tmp_path: Path) -> None:
    """The way around what FSDP2 refuses: the pattern is laid on after the shards are gathered."""
    in_two_ranks(FULLY_SHARDED, tmp_path)
