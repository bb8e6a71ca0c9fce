"""The tuner that all prompt methods share: finds the blocks, wraps them, keeps PEFT's promises."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ...attention import BakedKeysValues
from ...backbones import Backbone, find_backbone
from ...choices import check_choice
from .block import BASE_ADAPTER, PromptedBlock, raise_merge_error, silence_frozen_modules
from .checkpoint import verify_tensors
from .config import PromptConfig
from .head import TaskHead, check_heads, check_modules_to_save, complete_task, linear_heads, wrap_heads
from .prompts import BlockLayout, Direction, Prompts, StaticPrompts


Insertion = Literal["keys_values", "tokens"]


class EmbeddingsHook:
    """Forward pre-hook of the embeddings, which stand before the first block and see the image.

    Their frozen dropout stays off while prompts train, also in a model that is not wrapped in a tuner
    (`inject_adapter_in_model`, `add_adapter` of Transformers), whose `train()` turns it on.

    Args:
        backbone: The backbone's layout.
        blocks: The wrapped blocks.
        model: The model.
    """

    def __init__(self, backbone: Backbone, blocks: list[PromptedBlock], model: nn.Module):
        self.backbone = backbone
        self.blocks = blocks
        self.model = model

    def is_beside(self, adapter_names: list[str] | None) -> bool:
        """Whether a block finds something that was left for it earlier in the forward pass."""
        used = (prompts for block in self.blocks for prompts in block.used_prompts(adapter_names))
        return any(prompts.pooled or prompts.stateful or not prompts.deep for prompts in used)

    def checkpoint_stages(self, allowed: bool) -> None:
        """Lets stages be checkpointed whole, where checkpointing is on, or not.

        What flows from block to block beside the tokens is gone when several blocks, or all of a wrapped one, are
        computed anew. The blocks of a stage are checkpointed one by one instead, where the family does that.
        """
        stages = self.backbone.stages(self.model)
        if not stages:
            return
        # Others than the stages know whether it is on: the blocks in them, or the encoder around them.
        others = [module for module in self.model.modules() if not any(module is stage for stage in stages)]
        is_on = any(getattr(module, "gradient_checkpointing", False) for module in others)
        for stage in stages:
            stage.gradient_checkpointing = is_on and allowed

    def refuse_reentrant_checkpointing(self, adapter_names: list[str] | None) -> None:
        """Raises `ValueError` if the model is about to run blocks in a way that loses the gradient of prompts."""
        stages = self.backbone.stages(self.model)
        # Prompts that are among the tokens are an argument of the block, which keeps its gradient.
        blocks = [b.base_layer for b in self.blocks if stages or any(p.deep for p in b.used_prompts(adapter_names))]
        checkpointed = [*stages, *blocks]
        functions = [
            module._gradient_checkpointing_func
            for module in checkpointed
            if getattr(module, "gradient_checkpointing", False) and module.training
        ]
        is_reentrant = any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)
        if self.backbone.record.checkpoints_outside and self.backbone.below(self.model, "").grad_checkpointing:
            from timm.layers import use_reentrant_ckpt

            is_reentrant = use_reentrant_ckpt()
        if is_reentrant:
            raise ValueError(
                "Found reentrant gradient checkpointing, which loses the gradient of prompts. They need the "
                "non-reentrant form. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                "{'use_reentrant': False}), in timm `timm.layers.set_reentrant_ckpt(False)`."
            )

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        for block in self.blocks:
            block.forget()
        if not all(block.disable_adapters for block in self.blocks):
            self.refuse_reentrant_checkpointing(adapter_names)
        if module.training:
            # Not the embeddings alone: DINOv3 draws positions at random beside them.
            silence_frozen_modules(self.model)
        self.checkpoint_stages(not self.is_beside(adapter_names))
        if self.backbone.record.windows is not None and getattr(self.model, "_require_grads_hooks", None):
            # PEFT lets the embeddings' output require gradients, for reentrant checkpointing. Prompts need the other
            # kind, and the output of these embeddings is a tuple, on which that hook fails.
            self.model.disable_input_require_grads()
        if self.backbone.record.checkpoints_outside:
            for block in self.blocks:
                block.carries = not self.backbone.below(self.model, "").grad_checkpointing
        return args, self.check(args, kwargs, adapter_names)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str] | None) -> dict[str, Any]:
        """Looks at the arguments of the embeddings; returns the keyword arguments to go on with."""
        return kwargs


class PoolerHook:
    """Forward pre-hook of the module that averages tokens: puts the outputs of prompts among them.

    Args:
        last: The last block.
        norm: The backbone's final norm.
    """

    def __init__(self, last: PromptedBlock, norm: nn.Module):
        self.last = last
        self.norm = norm

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        outputs, self.last.outputs = self.last.outputs, None
        if outputs is None:
            return args
        tokens = args[0]  # (B, D, T)
        weights = outputs.pooled[..., None].to(tokens.dtype)
        total = tokens.sum(dim=2) + (self.norm(outputs.prompts) * weights).sum(dim=1)
        # The mean of one column is that column.
        return ((total / (tokens.shape[2] + weights.sum(dim=1)))[..., None],)


class PromptTuner(BaseTuner):
    """A frozen vision transformer whose blocks get prompts.

    `get_peft_model(model, config)` makes one. A method subclasses it with a `prefix` of its own and `make_prompts`.
    """

    config_cls: type[PromptConfig]
    tuner_layer_cls = PromptedBlock
    # Forward pre-hook of the embeddings.
    embeddings_hook_cls = EmbeddingsHook
    _insertion = "keys_values"
    # The blocks come from the backbone records.
    target_module_mapping: dict[str, str] = {}

    @classmethod
    def make_prompts(cls, config: PromptConfig, layout: BlockLayout, peers: list[Prompts]) -> Prompts:
        """Makes an adapter's prompts for one block.

        Args:
            config: The adapter's config, complete with `token_dim` and `num_layers`.
            layout: The block.
            peers: The adapter's prompts in earlier blocks, for what blocks share.
        """
        raise NotImplementedError

    def check_backbone(self, config: PromptConfig, backbone: Backbone) -> None:
        """Raises `ValueError` if a method cannot work with a backbone; fills what the config needs of it."""

    def initialize_from_images(self, batches: Iterable[Mapping[str, Any]], adapter_name: str | None = None) -> None:
        """Starts an adapter from training images, for methods that do so; to be called once before training.

        Args:
            batches: Batches as the model takes them, in random order. No more are read than the method needs; labels
                are not used.
            adapter_name: The adapter; the active one if None.
        """

    @classmethod
    def make_all_prompts(cls, config: PromptConfig) -> dict[int, Prompts]:
        """An adapter's prompts in all its blocks, by block index, without a model."""
        made: dict[int, Prompts] = {}
        for position, index in enumerate(config.resolved_layers(config.num_layers)):
            made[index] = cls.make_prompts(config, config.layout(index, position), list(made.values()))
        return made

    def prompted_blocks(self) -> list[PromptedBlock]:
        """The wrapped blocks, in the order of the backbone."""
        return [module for module in self.model.modules() if isinstance(module, PromptedBlock)]

    def prompts(self, adapter_name: str | None = None) -> dict[int, Prompts]:
        """An adapter's prompts by block index; those of the active adapter if no name is given."""
        name = adapter_name or self.active_adapters[0]
        return {block.index: block.prompts[name] for block in self.prompted_blocks() if name in block.prompts}

    def directions(self, adapter_name: str | None = None) -> list[Direction]:
        """What of an adapter's trained tensors has no effect but by its direction; the active adapter's if no name.

        Deep prompts meet the loss behind the norm before attention, LayerNorm(s·P) = LayerNorm(P) for s > 0, up to the
        norm's eps. The list leaves out where length counts: shallow prompts and, in the last block, pooled ones, which
        are tokens too, and blocks without such a norm (Swin-v2), which use prompts as they are.
        """
        name = adapter_name or self.active_adapters[0]
        blocks = [block for block in self.prompted_blocks() if name in block.prompts and block.norm is not None]
        kept = [b.prompts[name] for b in blocks if not (b.prompts[name].pooled and b.is_last)]
        found = [direction for prompts in kept if prompts.deep for direction in prompts.directions()]
        return [d for d in found if all(isinstance(t, nn.Parameter) and t.requires_grad for t in d.tensors)]

    def set_insertion(self, insertion: Insertion) -> None:
        """Chooses how deep prompts get into a block; both are the same function.

        Args:
            insertion: `"keys_values"` (the default) hands them to attention as extra keys and values; `"tokens"`
                concatenates them with the tokens, runs the whole block on them and cuts their outputs off, as the
                published implementations do.
        """
        check_choice("insertion", insertion, Insertion)
        if insertion == "tokens" and self._backbone.record.windows is not None:
            raise ValueError(
                f"Found insertion='tokens' for a {self._backbone.record.title}, whose attention splits a grid of "
                "tokens into windows. Prompts have no place on it. Leave it at 'keys_values', which is exact."
            )
        self._insertion = insertion
        for block in self.prompted_blocks():
            block.insertion = insertion

    def train(self, mode: bool = True) -> PromptTuner:
        """Sets the mode of prompts and heads; dropout and stochastic depth of the frozen backbone stay off."""
        super().train(mode)
        silence_frozen_modules(self.model)
        return self

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # What is filled in from this model stays here, so that a config can be used for several models.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.train(model.training)  # a model in training mode has its frozen dropout on until now
        self._remove_hooks(model)
        backbone, blocks = self._backbone, self.prompted_blocks()
        hook = self.embeddings_hook_cls(backbone, blocks, model)
        backbone.embeddings(model).register_forward_pre_hook(hook, with_kwargs=True)
        pooler = backbone.pooler(model)
        if pooler is not None and blocks[-1].is_last:
            norm = backbone.below(model, backbone.record.final_norm)
            pooler.register_forward_pre_hook(PoolerHook(blocks[-1], norm))

    def _remove_hooks(self, model: nn.Module) -> None:
        # Not through the handles of the hooks: they do not survive a copy of the model.
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, (EmbeddingsHook, PoolerHook)):
                    if isinstance(hook, EmbeddingsHook):
                        hook.checkpoint_stages(True)
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        return peft_config  # `_prepare_model` fills it in: it needs the model itself

    def _prepare_model(self, peft_config: PromptConfig, model: nn.Module) -> None:
        """Completes the config from the model and makes the adapter's heads; before that, everything is checked."""
        if any(isinstance(module, BakedKeysValues) for module in model.modules()):
            raise ValueError(
                "Found a model with baked prompts. New prompts need the backbone without them. Load the base model "
                "again, and keep the baked one for inference."
            )
        backbone = find_backbone(model)
        was_completed = peft_config.token_dim is not None
        depths = list(backbone.depths) if backbone.record.windows is not None else None
        self._check_refused(peft_config, backbone)
        for name, found in (
            ("token_dim", backbone.hidden_size),
            ("num_layers", backbone.num_layers),
            ("depths", depths),
        ):
            expected = getattr(peft_config, name)
            # A config that was saved before there were depths has none, and was made for a model without stages.
            if expected not in (None, found) or (name == "depths" and was_completed and expected != found):
                raise ValueError(
                    f"Found a model with {name}={found} and an adapter made for {name}={expected}. Both must be "
                    f"the same. Load it into the model it was trained on ({peft_config.base_model_name_or_path}), "
                    "or make a new one with a fresh config."
                )
            setattr(peft_config, name, found)
        if peft_config.revision is None:
            # The commit of the Hub that the backbone came from, where `hf_vpt.classifiers` or Transformers left it.
            peft_config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        layers = peft_config.resolved_layers(backbone.num_layers)
        if peft_config.layers_to_transform is not None:
            peft_config.layers_to_transform = layers
        names = [backbone.block_names[index] for index in layers]
        pattern = "|".join(map(re.escape, names))
        # A config that was completed before holds the names that its own release of Transformers had for the blocks.
        if peft_config.target_modules is not None and not was_completed:
            peft_config.fail("target_modules", "None: the blocks are found by the record; see layers_to_transform")
        self.check_backbone(peft_config, backbone)
        if peft_config.modules_to_save is None:
            peft_config.modules_to_save = list(backbone.heads)
            check_heads(backbone.heads, model)
        heads = linear_heads(peft_config, backbone, model)
        complete_task(peft_config, heads, model)
        check_modules_to_save(peft_config, model, heads)
        peft_config.target_modules = pattern
        self._backbone = backbone
        adapter_name = next(name for name, config in self.peft_config.items() if config is peft_config)
        wrap_heads(peft_config, heads, model, adapter_name, is_active=adapter_name in self.active_adapters)

    def _check_refused(self, config: PromptConfig, backbone: Backbone) -> None:
        """Raises if the backbone's record refuses the method or what the config asks for."""
        record = backbone.record
        asked = {config.method_name.removeprefix("HFVPT_").lower()}
        asked |= set() if config.deep else {"shallow"}
        asked |= {"pool_prompts"} if config.pool_prompts else set()
        for name in asked & record.refused.keys():
            raise ValueError(
                f"Found a request for {name!r} with {record.title}. It is refused: {record.refused[name]}. Use "
                "another method or another backbone; the README has a table of what goes with what."
            )
        if config.pool_prompts:
            if backbone.pooler(self.model) is None:
                config.fail("pool_prompts", f"False: this {record.title} does not average its tokens")
            if config.deep and backbone.num_layers - 1 not in config.resolved_layers(backbone.num_layers):
                config.fail("pool_prompts", "False unless the last block has prompts")

    def _create_and_replace(
        self,
        peft_config: PromptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        backbone = self._backbone
        index = backbone.block_names.index(current_key)
        self._wrap_blocks(range(backbone.num_layers) if not peft_config.deep else [index])
        block = next(block for block in self.prompted_blocks() if block.index == index)
        layout = peft_config.layout(
            index,
            peft_config.resolved_layers(backbone.num_layers).index(index),
            patch_size=backbone.patch_size,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )
        prompts = self.make_prompts(peft_config, layout, list(self.prompts(adapter_name).values()))
        prompts.pooled = peft_config.pool_prompts
        if not peft_config.init_weights:
            prompts.randomize()
        block.update_layer(adapter_name, prompts)
        if adapter_name not in self.active_adapters:
            prompts.requires_grad_(False)

    def _wrap_blocks(self, indices: range | list[int]) -> None:
        """Wraps blocks that are not wrapped yet. Shallow prompts need all of them: they pass through each."""
        backbone = self._backbone
        modules = [self.model.get_submodule(name) for name in backbone.block_names]
        for index in indices:
            if isinstance(modules[index], PromptedBlock):
                continue
            block = PromptedBlock(modules[index], index, backbone, self.prefix)
            block.set_adapter(self.active_adapters)
            block.insertion = self._insertion
            if index in backbone.stage_starts[1:] and backbone.record.merging is not None:
                stage = backbone.stages(self.model)[backbone.stage_starts.index(index) - 1]
                block._merging_before = [stage.get_submodule(backbone.record.merging)]
            self.model.set_submodule(backbone.block_names[index], block)
            modules[index] = block
        for block in self.prompted_blocks():
            if block.index > 0 and isinstance(modules[0], PromptedBlock):
                block._first = [modules[0]]

    # What PEFT's defaults get wrong for a block

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version looks for the weight of a linear layer.
        setattr(parent, child_name, child.release() if isinstance(child, PromptedBlock) else new_module)

    def unload(self) -> nn.Module:
        """Takes all prompts and heads out again and returns the base model as it was."""
        training = self.model.training
        # PEFT would leave the trained head on the backbone, where it means nothing without its prompts.
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                own = module.release() if isinstance(module, TaskHead) else module.original_module
                self.model.set_submodule(name, own)
        model = super().unload().train(training)
        self._remove_hooks(model)
        return model

    def bake(self) -> nn.Module:
        """Leaves the active adapters' prompts in the base model for good, and returns it without PEFT around it.

        What a static deep prompt does to a block is two constants, W_k·norm(P) and W_v·norm(P) of shape `(N, D)`
        each. They are computed once and become buffers of the block's attention; trained heads take the place of the
        base model's. The result is an ordinary model for inference, in evaluation mode and frozen: it computes what
        the wrapped one did, without its prompts' projections, and exports as it is. This tuner cannot be used
        afterwards.

        Returns:
            The base model.

        Raises:
            ValueError: The prompts are not constant (VAPT), flow on as tokens (shallow ones), are part of the
                image's feature (`pool_prompts`), or are disabled.

        To write it to a file use `hf_vpt.export`, which also keeps `torch.export` from adding masks to BEiT's bias.

        Example:
            >>> baked = model.bake()
            >>> logits = baked(pixel_values=pixel_values).logits
        """
        for block in self.prompted_blocks():
            if block.disable_adapters:
                raise ValueError(
                    "Found disabled adapters, in a request to bake them. Active prompts alone become constants: call "
                    "`bake()` outside of `disable_adapter()`, or get the bare model with `unload()`."
                )
            for prompts in block.used_prompts():
                _check_constant(prompts)
        self.eval()
        # Before the blocks go, which know the norm and the projections; after they have closed the attention modules.
        baked = [(block.access, block.attention, block.constant_keys_values()) for block in self.prompted_blocks()]
        model = super().unload().eval()
        self._remove_hooks(model)
        for access, attention, keys_values in baked:
            if keys_values is not None:
                access.bake(attention, keys_values)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = refuse_to_save
        return model.requires_grad_(False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, in a time that does not depend on how many there are."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(
                f"Found no adapter called {', '.join(map(repr, unknown))}. The model has "
                f"{', '.join(map(repr, self.peft_config))}: choose among them, or load it first."
            )
        pending = [self.model]
        while pending:
            module = pending.pop()
            if isinstance(module, AuxiliaryTrainingWrapper):
                name = module.check_set_adapter(adapter_name)
                module.set_adapter(name if name in module._adapters else [], inference_mode=inference_mode)
            elif isinstance(module, PromptedBlock):
                module.set_adapter(adapter_name, inference_mode=inference_mode)
                pending.append(module.base_layer)
            else:
                pending.extend(module.children())
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; if it was the only active one, the first by name of those left becomes active."""
        remaining = sorted(self.peft_config.keys() - {adapter_name})
        if self.active_adapters == [adapter_name] and remaining:
            # PEFT lets each block choose among the adapters it has, so that blocks with different ones would disagree.
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {remaining[0]}.",
                stacklevel=2,
            )
            self.set_adapter(remaining[0])
        super().delete_adapter(adapter_name)

    def _check_merge_allowed(self) -> None:
        raise_merge_error()

    def unmerge_adapter(self) -> None:
        raise_merge_error()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            return
        # PEFT takes half-precision parameters to float32, but leaves buffers (BPT's fixed basis) behind.
        for prompts in self.prompts(adapter_name).values():
            for buffer in prompts.buffers():
                if buffer.dtype in (torch.float16, torch.bfloat16):
                    buffer.data = buffer.data.float()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT takes the name only for the last or the last but one part of a key; modules in prompts nest deeper.
        return re.sub(
            rf"(\.{cls.prefix}prompts)\.{re.escape(adapter_name)}(?=\.)", lambda match: match[1], key, count=1
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PromptConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        verify_tensors(config, state_dict, adapter_name)
        # The number of a block says which one is meant. Its path may be another one than when the adapter was saved:
        # in a model with or without a task head, or in another release of Transformers.
        paths = {module.index: name for name, module in model.named_modules() if isinstance(module, PromptedBlock)}
        marker = f".{cls.prefix}prompts."
        for key in [key for key in state_dict if marker in key]:
            path, _, rest = key.partition(marker)
            state_dict[f"{paths[config.block_index(path)]}{marker}{rest}"] = state_dict.pop(key)
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names`, the adapter of each image of a batch, to blocks and heads for one forward pass."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()`.")
        unknown = set(adapter_names) - self.peft_config.keys() - {BASE_ADAPTER}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. The model has "
                f"{', '.join(sorted(self.peft_config))}; {BASE_ADAPTER!r} stands for no adapter."
            )
        # A model with a text tower takes text first.
        images_first = getattr(self.model, "main_input_name", "pixel_values") == "pixel_values"
        images = args[0] if args and images_first else kwargs.get("pixel_values")
        if images is not None and len(images) != len(adapter_names):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {len(images)} respectively."
            )
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        without = {name for wrapper in wrappers for name in set(adapter_names) - wrapper._adapters - {BASE_ADAPTER}}
        if without:
            raise ValueError(
                f"Found adapters without a head of their own in `adapter_names`: {', '.join(sorted(without))}, beside "
                "adapters that have one. All need one or none. Give them one with modules_to_save."
            )
        hook = partial(_pass_adapter_names, adapter_names=list(adapter_names))
        # First among the hooks, so that the one on the embeddings finds the names and takes them out again.
        handles = [
            module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            for module in [*self.prompted_blocks(), *wrappers, self._backbone.embeddings(self.model)]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_constant(prompts: Prompts) -> None:
    """Raises `ValueError` if prompts cannot become constant keys and values."""
    if not isinstance(prompts, StaticPrompts):
        found, instead = "prompts that depend on the image", "export the wrapped model as it is"
    elif not prompts.deep:
        found, instead = "shallow prompts, which go from block to block as tokens", "export the wrapped model as it is"
    elif prompts.pooled:
        found, instead = "pool_prompts, which needs what prompts become", "train an adapter without it"
    else:
        return
    raise ValueError(
        f"Found {found}, in a request to bake them. Only deep prompts that are the same for every image are constant "
        f"keys and values. Use `eval()` and the model with its adapter, or {instead}."
    )


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Stands in for `save_pretrained` of a baked model, which `from_pretrained` would load without its prompts."""
    raise NotImplementedError(
        "Found a request to save a model with baked prompts. To load such a checkpoint, Transformers would need a "
        "class that knows of them. Save the adapter before it is baked, or write the model to "
        "one file with `hf_vpt.export`."
    )


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
