"""Sharded training (FSDP2): weights, gradients and optimiser states spread over the data-parallel ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT

DATA_PARALLEL = "data_parallel"  # as Lightning's ModelParallelStrategy calls this axis of its mesh
# A sub-network gathers its weights when one of these is called, and not only in `forward`.
BLOCK_METHODS = {
    "attn1": ("self_attention",),
    "attn2": ("project", "cross_attention"),
    "speech_attn": ("project", "cross_attention"),
    "ff": (),
}


def shard(part: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters of a transformer or a SpeechAE over ``mesh``, in place; a second call does nothing.

    The attentions and the feed-forward layer of each block are gathered one at a time; all that is small (norms,
    tables, embeddings) at once.
    """
    if type(part) not in (A2VDiT, SpeechAE):  # a sharded network has a class of its own
        return
    data_parallel = mesh[DATA_PARALLEL]
    if isinstance(part, SpeechAE):
        for parameter in part.parameters():  # its convolutions lie channels-last, which FSDP2 does not take
            parameter.data = parameter.data.contiguous()
        fully_shard(part, mesh=data_parallel)
        register_fsdp_forward_method(part, "encode")
        return
    for block in list(part.transformer_blocks):  # type: ignore[arg-type]
        for name, methods in BLOCK_METHODS.items():
            layer = getattr(block, name)
            if layer is not None:
                fully_shard(layer, mesh=data_parallel)
                for method in methods:
                    register_fsdp_forward_method(layer, method)
    fully_shard(part, mesh=data_parallel)
    register_fsdp_forward_method(part, "prefill")
