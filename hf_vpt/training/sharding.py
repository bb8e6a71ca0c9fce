"""The frozen backbone shared out over several devices (FSDP2), whatever way prompts go between its blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import accelerate
import torch
from accelerate import Accelerator
from packaging.version import Version
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..backbones import BACKBONES, find_backbone
from ..tuners.base import Prompts


# Before, the processes behind the first one did not get an adapter's tensors from a checkpoint.
FIRST_ACCELERATE = Version("1.15.0")


def shard_blocks(model: nn.Module, accelerator: Accelerator) -> None:
    """Makes each block of a backbone a unit of FSDP2, and all that prompts learn another one.

    A block is gathered while it runs. The whole of it is the unit, because its norm and projections also run on the
    prompts, before the frozen block does. The prompts of all blocks are one unit, gathered once in a step: a block may
    use what is stored in another one (a projection or projector that blocks share, a prompt that has moved). The head
    and the embeddings are left to the root.

    Models of families without a record are left to Accelerate's own policy.

    Args:
        model: A classifier, plain or adapted, before there is an optimizer.
        accelerator: What the settings of FSDP are read from.

    Raises:
        ImportError: If Accelerate is too old for adapters under FSDP.
        ValueError: If the settings ask for FSDP1 or for loading that leaves the weights in the first process, or if
            the backbone is quantised.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(base.config, "model_type", None) not in BACKBONES:
        return
    if isinstance(model, PeftModel) and Version(accelerate.__version__) < FIRST_ACCELERATE:
        raise ImportError(
            f"Found Accelerate {accelerate.__version__} and an adapter under FSDP. Checkpoints of adapters are loaded "
            f"in all processes from {FIRST_ACCELERATE} on. Install it with `pip install 'accelerate>="
            f"{FIRST_ACCELERATE}'`, or launch with configs/accelerate/ddp.yaml."
        )
    plugin = accelerator.state.fsdp_plugin
    if getattr(base, "is_quantized", False):
        raise ValueError(
            "Found a quantised backbone and FSDP, which cannot share out its integers. A backbone is either quantised "
            "or shared out. Leave quantization out, or launch with configs/accelerate/ddp.yaml."
        )
    if plugin.fsdp_version != 2:
        raise ValueError(
            "Found FSDP of version 1, whose units hold either trained or frozen weights. Prompts in a frozen block "
            "need FSDP2. Set fsdp_version: 2 in Accelerate's configuration, as configs/accelerate/fsdp2.yaml does."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Found cpu_ram_efficient_loading, with which only one process has the weights of the backbone. Its blocks "
            "are shared out by those that have them. Set fsdp_cpu_ram_efficient_loading: false in Accelerate's "
            "configuration, as configs/accelerate/fsdp2.yaml does."
        )
    # The model's own list of layers to share out knows nothing of prompts, and ViT's overlaps with what Accelerate
    # shares out besides.
    plugin.auto_wrap_policy = None
    mesh = getattr(accelerator, "torch_device_mesh", None)
    settings = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    # What is inside comes first: a unit holds what no unit inside of it does.
    prompts = [m for m in base.modules() if isinstance(m, Prompts) and any(p.requires_grad for p in m.parameters())]
    if prompts:
        fully_shard(prompts, **settings | {"reshard_after_forward": False})
    backbone = find_backbone(base)
    if backbone.record.windows is not None and any(p.pooled or not p.deep for p in prompts):
        # What flows from block to block beside the tokens is no output of a block, so that FSDP does not see its
        # gradient coming: blocks must not give back what they gathered before the backward pass.
        settings["reshard_after_forward"] = False
    for name in backbone.block_names:
        fully_shard(base.get_submodule(name), **settings)


def names_in_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Returns the names of the parameters in each group of an optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def replace_in_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, names: list[list[str]]) -> None:
    """Puts what a model's parameters have become into the groups of its optimizer.

    Accelerate finds them by their address in memory. The shares of parameters with fewer rows than there are processes
    are empty and have none, so that it takes one of them for all others.
    """
    parameters = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in members]


def gathered(model: nn.Module) -> AbstractContextManager:
    """Within it a model can run before training has begun, although DeepSpeed (ZeRO-3) loads it in shares."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))
