"""strategy=fsdp: weights, gradients, averages, optimizer state shared out over devices (FSDP2); and
strategy=ddp: all of it on each device.

A checkpoint has the same content as on one device; each reads the other's.
"""

import inspect
from dataclasses import replace
from functools import partial

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from checkpointing.restricted_pickle import CheckpointError
from checkpointing.sharded_index import is_in_parts
from samplers.sending import send
from training.checkpoint_io.parts import as_part, load_in_place, saves_parts

# of blocks, as they are sent. With less than UNIT_BYTES the host takes longer for the hooks and
# exchanges of a unit than the device for its products. If all blocks together have at most
# WHOLE_BYTES, they are one unit, which stays from the forward pass to the end of the backward pass
UNIT_BYTES, WHOLE_BYTES = 50 << 20, 200 << 20


class _Saving:
    """Of a strategy: in a checkpoint in parts every rank writes its own."""

    def save_checkpoint(self, checkpoint: dict, filepath, storage_options=None) -> None:
        if self.is_global_zero or saves_parts(self):
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


class Replicated(_Saving, DDPStrategy):
    """Lightning's strategy for ddp. Gradients are views of what is exchanged, so nothing is copied.
    Buffers are not sent before each pass: they are constants, or follow from what all devices
    know. half: gradients are divided, sent and added up in bfloat16."""

    def __init__(self, half: bool = False):
        self.half = half
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        super().__init__(gradient_as_bucket_view=True, **{name: False})

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # if it knew its device, it would send batches there; the host needs them for loss inputs
        wrapped = DistributedDataParallel(model, **self._ddp_kwargs)
        if self.half:
            wrapped.register_comm_hook(None, in_bf16)
        return wrapped


def in_bf16(group, bucket):
    """torch's hook, which under its own name is refused on CPUs."""
    return bf16_compress_hook(group, bucket)


class Sharded(_Saving, ModelParallelStrategy):
    """Lightning's strategy for FSDP2, reading checkpoints as every other run does. `replicate`:
    groups of neighbouring devices, each of which shares out a model of its own. `half`: gradients
    are sent and added up in bfloat16."""

    def __init__(self, devices: int, replicate: int = 1, half: bool = False):
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        self.replicate, self.half = replicate, half

    def mesh(self) -> DeviceMesh:
        """[devices], or [groups, devices of a group]."""
        if self.replicate == 1:
            return self.device_mesh["data_parallel"]
        shape = self.replicate, self.world_size // self.replicate
        names = "replicate", "shard"
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def lightning_module_state_dict(self) -> dict:
        if saves_parts(self):
            return dict(state_dict.get_model_state_dict(self.model))
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer) -> dict:
        if saves_parts(self):
            return optimizer.state_dict()
        return super().optimizer_state(optimizer)

    def _read_parts(self, path: str) -> dict:
        """An error on one rank is one on all: the others would wait for it."""
        checkpoint, problem = None, None
        try:
            checkpoint = load_in_place(self.lightning_module, self.optimizers, path)
        except (CheckpointError, OSError) as error:
            problem = error
        if not self.reduce_boolean_decision(problem is None):
            raise problem or CheckpointError(f"{path}: another process could not read its part")
        return checkpoint

    def load_checkpoint(self, checkpoint_path, weights_only=None) -> dict:
        path = self.broadcast(checkpoint_path)
        if is_in_parts(path):
            checkpoint = self._read_parts(path)
            set_fused(checkpoint, self.lightning_module.fused())
            for optimizer, state in zip(
                self.optimizers, checkpoint["optimizer_states"], strict=True
            ):
                optimizer.load_state_dict(state)
            return checkpoint
        checkpoint = self.checkpoint_io.load_checkpoint(path)
        set_fused(checkpoint, self.lightning_module.fused())  # state.load_state comes later
        options = state_dict.StateDictOptions(full_state_dict=True)
        state_dict.set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        states = checkpoint.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states, strict=bool(states)):
            named = fsdp.FullyShardedDataParallel.rekey_optim_state_dict(
                state, fsdp.OptimStateKeyType.PARAM_NAME, self.model
            )
            state_dict.set_optimizer_state_dict(self.model, optimizer, named, options=options)
            for group in optimizer.param_groups:
                group["betas"] = tuple(group["betas"])  # which comes back as a list
        return checkpoint


def share_out(module: L.LightningModule) -> None:
    """With strategy=fsdp: share the network out, and its average in the same way. The blocks are
    put together a unit at a time, the rest for a whole pass.

    With bf16-mixed the linear layers of the blocks are sent in bfloat16, as autocast would round
    them. What it computes in float32 (norms, embedding) and the head, whose gradient is summed in
    float32, belong to the rest, which is sent as it is. Gradients are summed in float32, or all in
    bfloat16 where the strategy says so (`half`).
    """
    strategy, backbone = module.trainer.strategy, module.backbone
    if not isinstance(strategy, Sharded) or has_sharded_weights(backbone):
        return
    half = module.trainer.precision == "bf16-mixed"
    summed = torch.bfloat16 if strategy.half else torch.float32 if half else None
    of_rest = fsdp.MixedPrecisionPolicy(
        reduce_dtype=torch.bfloat16 if strategy.half else None,
        cast_forward_inputs=False,  # autocast does, where it is needed
    )
    sent = torch.bfloat16 if half else None
    policy = replace(of_rest, param_dtype=sent, reduce_dtype=summed)
    share = partial(fsdp.fully_shard, mesh=strategy.mesh())
    # The rest comes first, though it is around the blocks: it has parameters of theirs
    of_blocks = _block_parameters(backbone, half)
    share(backbone, mp_policy=of_rest, reshard_after_forward=False, ignored_params=of_blocks)
    blocks, width = list(backbone.blocks), 2 if half else 4
    sizes = [width * sum(p.numel() for p in block.parameters()) for block in blocks]
    together = units(sizes, alone=bool(backbone.recompute))
    several = len(together) > 1
    for numbers in together:
        unit = [blocks[number] for number in numbers]
        others = {p for block in unit for p in block.parameters()} - of_blocks
        share(unit, mp_policy=policy, reshard_after_forward=several, ignored_params=others)
    backbone.compile_inside_hooks()
    for name in ("hidden", "features", "logits"):  # the objectives do not call `forward`
        fsdp.register_fsdp_forward_method(backbone, name)
    if module.ema is not None:
        like, averages = dict(module.backbone.named_parameters()), module.ema.shadow
        module.ema.shadow = {name: part_of(averages[name], like[name]).clone() for name in averages}


def units(sizes: list[float], alone: bool) -> list[range]:
    """The numbers of the blocks that are put together at once, neighbours; sizes: bytes of all.
    alone: one block each. So it must be where blocks are made again, one by one: a unit is let go
    when all its blocks ran."""
    least = UNIT_BYTES if sum(sizes) > WHOLE_BYTES else WHOLE_BYTES
    made, begun, size = [], 0, 0
    for number, more in enumerate(sizes, start=1):
        size += more
        if alone or size >= least or number == len(sizes):
            made.append(range(begun, number))
            begun, size = number, 0
    return made


def _block_parameters(backbone: nn.Module, linear: bool) -> set[nn.Parameter]:
    """Those of the blocks, or of their linear layers alone."""
    return {
        p
        for layer in backbone.blocks.modules()
        if isinstance(layer, nn.Linear) or not linear
        for p in layer.parameters(recurse=False)
    }


def has_sharded_weights(backbone: nn.Module) -> bool:
    return isinstance(backbone, fsdp.FSDPModule)


def reshard(backbone: nn.Module) -> None:
    """Between two passes: let go of what is put together of a network that is shared out."""
    for layer in backbone.modules():
        if isinstance(layer, fsdp.FSDPModule):
            layer.reshard()


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of it; shares its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # else a node of autograd is made, three times a step for each weight
        return tensor.to_local()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `like` is."""
    if isinstance(whole, DTensor):
        return whole.to_local()
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    ).to_local()


def whole_of(mine: Tensor, like: Tensor) -> Tensor | None:
    """The whole of which `mine` is this rank's part, on the host; every rank must ask. Rank 0 alone
    gets it, which writes the checkpoint: a host would otherwise hold it once for each device."""
    joined = as_part(mine, like)
    if not isinstance(joined, DTensor):
        return mine
    whole = joined.full_tensor()
    return whole.cpu() if torch.distributed.get_rank() == 0 else None


def norms_of(tensors: list[Tensor]) -> Tensor:
    """The norm of each, float32 [N], of which ranks may hold parts; every rank must ask. In one
    exchange, and without waiting for the device."""
    norms = torch.stack(torch._foreach_norm([part(tensor) for tensor in tensors]))
    if not isinstance(tensors[0], DTensor):
        return norms
    mesh = tensors[0].device_mesh
    squares = norms.double().square()  # in float32 that of 1e20 would be infinite
    torch.distributed.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    return squares.sqrt().to(norms.dtype)


def set_fused(checkpoint: dict, fused: bool | None) -> None:
    """How the steps of AdamW are computed here, in the optimizer states of a checkpoint; a file of
    weights alone has none."""
    for state in checkpoint.get("optimizer_states", []):
        for group in state.get("param_groups", []):  # with fsdp rank 0 alone has it
            if "betas" in group:
                group["fused"] = fused


class Poll:
    """Yes-or-no questions that all ranks ask equally often: is the answer yes on any of them?

    `late`: a call returns the answers to the call before it, and the first call returns no. Its own
    answers would have to wait for all the work of the device. None: late on an accelerator.
    """

    def __init__(self, late: bool | None = None):
        self.late = late
        self.coming = None  # what `send` gave for the last questions

    def __call__(self, device: torch.device, *mine: bool) -> list[bool]:
        """One answer for each of `mine`."""
        if not _in_group():
            return list(mine)
        counts = torch.zeros(len(mine), device=device)
        for place, yes in zip(counts, mine, strict=True):
            place.fill_(yes)  # made on the device: to send numbers there would wait for it
        torch.distributed.all_reduce(counts)
        before, self.coming = self.coming, send(counts)
        late = device.type != "cpu" if self.late is None else self.late
        if late and before is None:
            return [False] * len(mine)
        arrived, numbers = before if late else self.coming
        arrived.synchronize()
        return [number > 0 for number in numbers.tolist()]


def leave_group() -> None:
    """End the threads of the process group. At the exit of the process, those of gloo may outlive
    what they use, and abort it."""
    if _in_group():
        torch.distributed.destroy_process_group()


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
