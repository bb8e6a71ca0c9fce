"""Training that starts at the first block with prompts, from what the frozen blocks before made of each image once."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..data import collate_images
from ..data.arguments import DataArguments
from ..data.cache import cache_folder, make_key
from ..data.fingerprint import identify_images
from ..data.prefixes import PrefixImages
from ..prefix import FrozenPrefix, first_block_with_prompts
from .images import without_transforms
from .parsing import Settings


logger = logging.get_logger(__name__)


def check_prefix_caching(settings: Settings) -> None:
    """Raise before anything is loaded if `cache_prefix` does not go with the other settings.

    Raises:
        ValueError: A setting changes images or backbone while training, or needs all blocks.
    """
    model_args, data_args, training_args, peft_config = settings
    if not data_args.cache_prefix:
        return
    if model_args.method in ("full", "bias", "lora"):
        found = f"method '{model_args.method}', which changes every block"
        _refuse(found, "choose a prompt method or linear_probe")
    if peft_config is not None and not peft_config.deep:
        _refuse("deep: false, with which prompts flow through all blocks", "use deep prompts")
    layers = None if peft_config is None else peft_config.layers_to_transform
    if peft_config is not None and (layers is None or 0 in layers):
        remedy = "give prompts to later blocks alone, for example layers_to_transform: [-1]"
        _refuse(f"layers_to_transform {layers}, with prompts in block 0", remedy)
    if getattr(peft_config, "relocation_steps", None) is not None:
        _refuse(
            f"relocation_steps {peft_config.relocation_steps}, after which another block may be the first one with "
            "prompts",
            "move prompts between epochs (relocation_steps: null)",
        )
    for name in ("mixup_alpha", "cutmix_alpha"):
        if getattr(training_args, name):
            _refuse(f"{name} {getattr(training_args, name):g}, which mixes images anew each time", f"set {name} to 0")
    for name in ("torch_compile", "bf16_full_eval", "fp16_full_eval", "fsdp", "deepspeed"):
        if getattr(training_args, name, None):
            _refuse(f"{name} {getattr(training_args, name)}", f"leave {name} out")


def _refuse(found: str, remedy: str) -> None:
    raise ValueError(
        f"Found cache_prefix and {found}. What is computed once needs images and first blocks that stay as they are, "
        f"and a model whose blocks can be left out: {remedy}, or leave cache_prefix out."
    )


class PrefixCaching(TrainerCallback):
    """Fills a cache with the inputs of the first block with prompts, and lets training and evaluation start there.

    Before training, before an epoch for which a prompt moved to or from the first block, and before an evaluation,
    each image that is not in the cache passes the frozen blocks once, without gradients; several processes share the
    images. To be added behind `RelocationCallback`, with an `ImageClassificationTrainer`, whose data sets are
    `PrefixImages`.

    Args:
        trainer: The trainer that the callback is added to.

    Raises:
        ValueError: The model is none that can start at a later block, see `FrozenPrefix`, or it is shared out.
    """

    def __init__(self, trainer: transformers.Trainer):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            _refuse("FSDP or DeepSpeed, which share the model out", "launch with configs/accelerate/ddp.yaml")
        self.trainer = trainer
        self.prefix = FrozenPrefix(trainer.model)
        self.prefix.attach()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.prepare(self.trainer.train_dataset)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.prepare(self.trainer.train_dataset)

    def on_evaluation_begin(self, dataset: Dataset) -> None:
        """Told by the trainer, before the first image is read."""
        self.prepare(dataset)

    def prepare(self, images: Dataset) -> None:
        """Makes images ready to be read as inputs of the block that is the first one with prompts now."""
        if not isinstance(images, PrefixImages):
            return
        block = first_block_with_prompts(self.trainer.accelerator.unwrap_model(self.trainer.model))
        if block == images.block and block == self.prefix.block:
            return
        self.prefix.block = block
        images.start_at(0)
        if not block:
            logger.warning("Block 0 has prompts now, so images pass all blocks and nothing is cached.")
            return
        # One image shows shape, size and dtype, also where all are cached.
        tokens = self._compute([images.pixels[0]])
        images.start_at(block, tokens.shape[1:])
        missing = images.cache.missing()
        self.trainer.accelerator.wait_for_everyone()  # so that all divide the same images among them
        self._fill(images, missing[self.trainer.args.process_index :: self.trainer.args.world_size])
        self.trainer.accelerator.wait_for_everyone()
        # Elsewhere than on the first machine, where the folder is not shared, the others' part is missing.
        self._fill(images, images.cache.missing())
        self.trainer.accelerator.wait_for_everyone()

    def _fill(self, images: PrefixImages, indices: list[int]) -> None:
        if not indices:
            return
        args = self.trainer.args
        logger.info(f"Caching the inputs of block {self.prefix.block} for {len(indices)} images.")
        loader = DataLoader(
            Subset(images.pixels, indices),
            batch_size=args.per_device_eval_batch_size,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
        )
        remaining = iter(indices)
        # Data loaders draw a seed; what trains must not depend on what is cached.
        with torch.random.fork_rng(devices=[]):
            for examples in loader:
                for tokens, index in zip(self._compute(examples), remaining):
                    images.cache.write(index, tokens)

    def _compute(self, examples: list[dict[str, Any]]) -> torch.Tensor:
        pixel_values = collate_images(examples)["pixel_values"].to(self.trainer.args.device)
        with self.trainer.accelerator.autocast():
            return self.prefix.compute(pixel_values)


def cache_prefixes(splits: dict[str, Any], trainer: transformers.Trainer, data_args: DataArguments) -> PrefixCaching:
    """Let a trainer read every split by way of a cache. See `PrefixCaching`.

    Args:
        splits: What `prepare_images` returns; changed in place.
        trainer: The trainer, with its model on its device, which gets the callback and the new splits.
        data_args: Where the cache lies, and in which number format.
    """
    callback = PrefixCaching(trainer)
    processor: BaseImageProcessor = trainer.processing_class
    key = [callback.prefix.fingerprint(), type(processor).__name__, processor.to_dict(), data_args.cache_dtype]
    key += [trainer.accelerator.mixed_precision, trainer.args.tf32, trainer.args.device.type, torch.__version__]
    folder = cache_folder(data_args.cache_dir, "prefixes")
    for split, pixels in splits.items():
        images = without_transforms(pixels)
        own = make_key(*key, *identify_images(images))
        splits[split] = PrefixImages(images, pixels, own, folder, getattr(torch, data_args.cache_dtype))
    trainer.train_dataset, trainer.eval_dataset = splits["train"], splits["validation"]
    trainer.add_callback(callback)
    return callback
