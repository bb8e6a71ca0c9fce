"""The frozen blocks before the first prompt: run once, and left out ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .backbones import find_backbone
from .data.cache import make_key
from .tuners.base.block import PromptedBlock


# What of a model's config has no part in the tokens between its blocks.
_NO_PART = ("id2label", "label2id", "num_labels", "problem_type", "architectures", "_name_or_path", "dtype")


class FrozenPrefix:
    """Starts a model at its block k, from the tokens that its frozen blocks 0 to k − 1 made of an image before.

    No prompt reaches what stands before the first block that has some. So the tokens x_k that enter it are a function
    of the image alone, and with x_k kept, a forward pass costs (L − k) / L of the whole. The model itself still makes
    masks, position biases and rotary positions, from images of zeros in the images' size, and runs its hooks.

    Once attached, the model takes tokens `(B, T, D)` where it takes pixel values `(B, C, H, W)`.

    Args:
        model: A frozen classifier with deep prompts of a method of this package, or one of which the head alone
            trains.

    Attributes:
        block: Index k of the block to start at; the number of blocks L for the norm and head behind them.
        image_shape: `(C, H, W)` of the images, as `compute` has seen them.
        dtype: Number format in which tokens enter `block`, likewise.

    Raises:
        ValueError: Tokens between two blocks are not all there is in this family; something before block k trains; or
            block 0 has prompts.

    Example:
        >>> model = get_peft_model(vit, VPTConfig(layers_to_transform=list(range(-4, 0))))
        >>> prefix = FrozenPrefix(model)
        >>> tokens = prefix.compute(pixel_values)
        >>> prefix.attach()
        >>> logits = model(pixel_values=tokens).logits  # equal to model(pixel_values=pixel_values).logits
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.backbone = find_backbone(self.base)
        self.image_shape: tuple[int, ...] | None = None
        self.dtype: torch.dtype | None = None
        self._running = ExitStack()
        self._check_family()
        self.block = first_block_with_prompts(model)
        if not self.block:
            raise ValueError(
                "Found prompts in block 0, or such as flow through all blocks. A cache of prefixes needs frozen "
                "blocks before the first prompt: give prompts to later blocks alone, for example with "
                f"layers_to_transform: {list(range(-4, 0))}, or leave cache_prefix out."
            )
        self._check_frozen()

    def _check_family(self) -> None:
        record, projection = self.backbone.record, self.base.get_submodule(self._projection_name)
        reason = None
        if record.windows is not None:
            reason = "its stages pass more than tokens on"
        elif record.shuffles_patches:
            reason = "it draws an order of the patches at random"
        elif not isinstance(projection, nn.Conv2d):
            reason = "its images have grids of their own"
        if reason is not None:
            raise ValueError(
                f"Found a {record.title}, for which tokens between two blocks are not all there is: {reason}. A cache "
                "of prefixes needs a plain ViT, such as ViT, DINOv2, CLIP or SigLIP: use one, or leave cache_prefix "
                "out."
            )
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self._vision_config, name, False):
                raise ValueError(
                    f"Found {name} in the model's config, and a request to leave blocks out, which have none then. "
                    f"Set model.config.{name} = False, or leave cache_prefix out."
                )

    def _check_frozen(self) -> None:
        trained = [name for name, tensor in self._tensors() if getattr(tensor, "requires_grad", False)]
        if trained:
            raise ValueError(
                f"Found {len(trained)} tensors that train before the first prompt, such as {trained[0]}. What is "
                "computed once needs frozen weights: freeze them (see modules_to_save), or leave cache_prefix out."
            )

    @property
    def _vision_config(self) -> Any:
        return getattr(self.base.config, "vision_config", self.base.config)

    @property
    def _projection_name(self) -> str:
        path = self.backbone.record.patch_projection
        return f"{self.backbone.root}.{path}" if self.backbone.root else path

    def _blocks(self) -> list[nn.Module]:
        return [self.base.get_submodule(name) for name in self.backbone.block_names]

    @torch.no_grad()
    def compute(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Runs the blocks before `block`, without dropout.

        Args:
            pixel_values: Images `(B, C, H, W)`.
            kwargs: Other arguments of the model, such as `interpolate_pos_encoding`.

        Returns:
            Tokens `(B, T, D)`.
        """
        self._running.close()  # what a pass that was interrupted has left
        last = self._blocks()[self.block - 1]
        forward, modes = last.forward, [(module, module.training) for module in self.model.modules()]

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Reached(forward(*args, **kwargs))

        self.model.eval()
        try:
            with _replaced(last, stop):
                self.base(pixel_values=pixel_values, **kwargs)
        except _Reached as reached:
            self.image_shape, self.dtype = tuple(pixel_values.shape[1:]), reached.tokens.dtype
            return reached.tokens
        finally:
            for module, training in modes:
                module.training = training
        raise RuntimeError(
            f"Found that {type(self.base).__name__} does not run block {self.block - 1}. Tokens between blocks need "
            "its blocks to run one after the other: use another model class, or leave cache_prefix out."
        )

    def attach(self) -> None:
        """Lets the model take tokens in the place of pixel values."""
        self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._running.close()  # as in `compute`
        is_first = bool(args) and self.base.main_input_name == "pixel_values"
        tokens = args[0] if is_first else kwargs.get("pixel_values")
        if tokens is None or tokens.ndim != 3:
            return args, kwargs
        if self.image_shape is None:
            raise RuntimeError(
                "Found tokens and no image before them. Their masks and positions need the size of the images they "
                "are made of: call `compute` with one of them first."
            )
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError(
                "Found a request for the hidden states or attentions of all blocks, and tokens with which a model "
                "starts behind some of them. These need the images: pass pixel values `(B, C, H, W)`."
            )
        self._check_left_out(kwargs.get("adapter_names"))
        self._running.enter_context(self.starting_from(tokens.to(self.dtype)))
        images = torch.zeros((), device=tokens.device).expand(len(tokens), *self.image_shape)
        return ((images, *args[1:]), kwargs) if is_first else (args, {**kwargs, "pixel_values": images})

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running.close()

    def _check_left_out(self, adapter_names: Sequence[str] | None) -> None:
        for index, block in enumerate(self._blocks()[: self.block]):
            if isinstance(block, PromptedBlock) and any(block.num_prompts(adapter_names)):
                raise RuntimeError(
                    f"Found prompts in block {index} and tokens with which the model starts at block {self.block}, so "
                    "that these prompts would do nothing. Tokens must be inputs of the first block with prompts: set "
                    "`block` to `first_block_with_prompts(model)` and `compute` them anew."
                )

    @contextmanager
    def starting_from(self, tokens: torch.Tensor) -> Iterator[None]:
        """Within it the model runs on images of zeros, with these tokens `(B, T, D)` at the input of `block`."""
        projection, blocks = self.base.get_submodule(self._projection_name), self._blocks()
        project = projection.forward

        def project_one(pixel_values: torch.Tensor) -> torch.Tensor:
            # All images are zeros; one of them shows shape and dtype.
            return project(pixel_values[:1]).expand(len(pixel_values), -1, -1, -1)

        def hand_over(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return tokens

        with ExitStack() as stack:
            stack.enter_context(_replaced(projection, project_one))
            for block in blocks[: self.block - 1]:
                stack.enter_context(_replaced(block, _pass_on))
            stack.enter_context(_replaced(blocks[self.block - 1], hand_over))
            yield

    def fingerprint(self) -> str:
        """Letters that stand for all that makes tokens of an image: weights before the last block's end, config and
        attention function.

        The same for each `block`. What an adapter or a head has learned has no part in it.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self._tensors(all_blocks=True):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        config = {key: value for key, value in self.base.config.to_dict().items() if key not in _NO_PART}
        return make_key(digest.hexdigest(), config, self._vision_config._attn_implementation)

    def _tensors(self, all_blocks: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """What images pass before block k (or the final norm): names below the root, parameters and buffers.

        Beside embeddings and blocks it is what the root has of its own (timm), and what stands beside its blocks
        before their end (CLIP's first norm, BEiT's shared bias). What follows the blocks may be drawn at random when
        a model is loaded, so that it must not be among it.
        """
        before = self._modules_before_blocks()
        blocks = self._blocks() if all_blocks else self._blocks()[: self.block]
        bare = [block.base_layer if isinstance(block, PromptedBlock) else block for block in blocks]
        for place, module, recurse in [*before, *((f"block {i}", block, True) for i, block in enumerate(bare))]:
            for tensors in (module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse)):
                yield from ((f"{place}: {name}", tensor) for name, tensor in tensors)

    def _modules_before_blocks(self) -> list[tuple[str, nn.Module, bool]]:
        """Path below the root, module, and whether all below it counts."""
        root = self.backbone.below(self.base, "")
        first = self.backbone.record.blocks.partition(".")[0]  # the container of the blocks, or the one around it
        last = [*dict(root.named_children())].index(first)
        names = [name for name, _ in root.named_children()][:last]
        if self.backbone.record.embeddings not in names:
            names.append(self.backbone.record.embeddings)
        return [("", root, False), *((name, root.get_submodule(name), True) for name in sorted(names))]


class _Reached(Exception):
    """Ends a forward pass where its tokens are."""

    def __init__(self, output: torch.Tensor | tuple[torch.Tensor, ...]):
        self.tokens = output[0] if isinstance(output, tuple) else output


def first_block_with_prompts(model: nn.Module) -> int:
    """Index of the first block that prompts of the active adapters serve now; the number of blocks if none do."""
    blocks = [module for module in model.modules() if isinstance(module, PromptedBlock)]
    served = [block.index for block in blocks if any(block.num_prompts())]
    if served:
        return min(served)
    return find_backbone(model.get_base_model() if isinstance(model, PeftModel) else model).num_layers


def _pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within it a module computes something else; hooks stay, and what was set on the module itself comes back."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
