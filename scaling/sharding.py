"""A run whose weights, gradients and moments are divided among its processes (FSDP2, ``launch.shard``).

Each process keeps a slice of every tensor, cut along its first axis. A layer's weights are gathered before it
is computed, forwards and backwards, and its gradients are added up where their slices belong. What is outside
the layers (embeddings, head) stays gathered from the forward to the backward pass.

Design choices
- torch's ``fully_shard`` and not Accelerate's plugin for it, which brings checkpoints of its own: ours hold
  whole tensors under the model's own names, so a run may go on with any number of processes, sharded or not.
- Weights are gathered in fp32 and cast where autocast casts them, as unsharded: bf16 on the way would halve
  the traffic, but round the norms and embeddings too.
- Gradients are added up at every micro-batch. Leaving that to the last one would keep them whole until then.
- Sums, then a division: in older torches gloo's average of a reduce-scatter is a sum (pytorch issue 162338).
- Layers are gathered by all processes together, so all need as many micro-batches, and none can begin a step
  anew by itself: out of memory, the job ends and starts again with smaller ones (``scaling.memory``).
- Evaluation and pictures take the whole model, put together for them, since the processes' shares of the
  images differ: so it has to fit beside the slices, without gradients and moments.

Imported by sharded runs only: torch's part of it takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scaling.checkpoint import Tensors
from scaling.objective import Objective
from scaling.schema import require


def shard(objective: Objective, bare: nn.Module, device: torch.device, processes: int) -> None:
    """Replace the parameters by this process's slices, layer by layer; they must be the same in all.

    The model may be in main memory: a layer goes to the device only to be cut.

    Args:
        bare: the family's module within the objective.
        device: where the slices live.

    Raises:
        ConfigError: this torch is too old for it.
    """
    require(
        hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
        f"launch.shard needs a newer torch than {torch.__version__}; it is tested with 2.13",
    )
    mesh = init_device_mesh(device.type, (processes,))
    for block in bare.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process calls it, for the same tensors in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's slice."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same in every process, into one that may be a slice of it."""
    if isinstance(target, DTensor):
        cut = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(cut.to_local())
    else:
        target.copy_(value)


def gathered(tensors: Tensors, keep: bool) -> Tensors:
    """Whole tensors in main memory, one at a time, where ``keep``, else nothing; every process calls it."""
    found: Tensors = {}
    for group, values in tensors.items():
        found[group] = {}
        for name, value in values.items():
            full = whole(value)
            if keep:
                found[group][name] = full.cpu()
    return found


@torch.no_grad()
def whole_model(sharded: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Another model with all the weights of a sharded one; every process calls it.

    Args:
        build: makes such a model; its start is thrown away.
    """
    with torch.device("meta"):
        model = build()
    model.to_empty(device=device)
    source = dict(sharded.named_parameters()) | dict(sharded.named_buffers())
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        target.copy_(whole(source[name]))
    return model
