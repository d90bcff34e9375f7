"""What ranks write together, however their tensors are cut, is the whole; others read their own."""

import os

import pytest
import torch
from runs import finish, ranks
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from checkpointing import sharded
from training.distributed import part

SIZES = {
    "even": (8, 3),
    "uneven": (5, 3),
    "fewer rows than ranks": (2, 4),
    "one": (1,),
    "bare": (7,),
}


def tensors():
    torch.manual_seed(1)
    return {name: torch.randn(size) for name, size in SIZES.items()}


def cut(mesh, placements):
    parts = {
        name: distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        for name, tensor in tensors().items()
    }
    return parts | {"bare": tensors()["bare"]}  # which all ranks hold


MESHES = {
    "one way": ((4,), [Shard(0)]),
    "replicas": ((2, 2), [Replicate(), Shard(0)]),  # hybrid sharding
    "two ways": ((2, 2), [Shard(0), Replicate()]),
}


@pytest.mark.parametrize("written", MESHES)
def test_parts_are_the_whole(written, tmp_path):
    path = str(tmp_path / "step=1.ckpt")

    def program(rank):
        distributed.init_process_group("gloo")
        shape, placements = MESHES[written]
        parts = cut(init_device_mesh("cpu", shape), placements)
        made = {"global_step": 1, "state_dict": parts}
        group = distributed.new_group(backend="gloo")
        sharded.write(sharded.take_apart(made, rank, 4), path, group=group, token="t")
        distributed.barrier()
        for shape, placements in MESHES.values():
            read = cut(init_device_mesh("cpu", shape), placements)
            for tensor in read.values():
                tensor.zero_()
            sharded.Sharded(path).load({f"state_dict/{name}": read[name] for name in read})
            for name, mine in cut(init_device_mesh("cpu", shape), placements).items():
                assert torch.equal(*map(part, (read[name], mine))), name
        distributed.destroy_process_group()
        os._exit(7)

    started = ranks(4, [], tmp_path / "log", before=program)
    assert finish(started) == [7] * 4, "".join(each.text() for each in started)
    found = sharded.read(path)["state_dict"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())
    assert not list(tmp_path.glob(".*"))
