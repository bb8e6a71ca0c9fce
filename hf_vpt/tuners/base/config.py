"""Fields and checks that the configs of all prompt methods share."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils import PeftType

from ...choices import check_choice
from ...demo import DEMO, demo_backbone_path
from ...hub.card import update_model_card
from .checkpoint import verify_checkpoint
from .prompts import BlockLayout


ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

# Configs come from the Hub, too: no number in one may keep a machine busy before anything is compared with weights.
MAX_NUM_LAYERS = 4096


@dataclass
class PromptConfig(PeftConfig):
    """What every prompt method can be told: how many prompts, in which blocks, and what else trains.

    Args:
        num_virtual_tokens: Number N of prompts in a block, at least 1.
        deep: Whether each block gets prompts of its own, whose outputs are thrown away after the block (`True`), or
            prompts are inserted once, before block 0, and flow through all blocks as tokens (`False`).
        pool_prompts: Whether what the prompts of the last block become is averaged into the image's feature, beside
            the patches, as the published code for Swin does. For backbones that average tokens (Swin, Swin-v2).
        prompt_dropout: Probability in [0, 1) with which an element of a prompt is zeroed while training, drawn for
            each image.
        layers_to_transform: Indices of the blocks that get prompts, `None` for all. Negative ones count from the last
            block, so `list(range(-4, 0))` are the last four. Deep prompts only.
        modules_to_save: Names of modules to train and save whole beside the prompts. `None` finds the task head by
            itself; `[]` leaves it frozen and out of the file.
        label_names: Names of the classes of the adapter's head, in the order of its outputs. `None` takes those of the
            model's configuration. An adapter may know other and more classes than the model's own head.
        problem_type: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`, as in
            Transformers; it decides on the loss of the model and on the scores of pipelines. `None` takes the model's.
        init_weights: `False` fills every tensor of the adapter with random numbers instead of the method's own
            initial values, so that tests see an adapter that changes the output.
        target_modules: Filled in from the backbone record; leave it `None`.
        token_dim: Width D that the adapter was made for; where stages have different widths, that of the first, which
            doubles from stage to stage. Filled in from the model.
        num_layers: Number of blocks of the model that the adapter was made for. Filled in from the model.
        depths: Blocks of each stage, None where the model has no stages. Filled in from the model.
        hf_vpt_version: Version of this package that the adapter was made with. Filled in.

    Raises:
        ValueError: If a field holds a wrong type, a value out of its range, or does not go with another field.
    """

    method_name: ClassVar[str]
    # Its name in texts, and its paper on arXiv.
    title: ClassVar[str]
    paper: ClassVar[str]
    # Shapes in the adapter file that this config was loaded with, by tensor name; never saved.
    saved_shapes: ClassVar[dict[str, tuple[int, ...]]] = {}

    num_virtual_tokens: int = field(default=10, metadata={"help": "Number of prompts in a block."})
    deep: bool = field(default=True, metadata={"help": "Prompts of its own for each block, or inserted once."})
    pool_prompts: bool = field(default=False, metadata={"help": "Average prompt outputs into the image's feature."})
    prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout on the prompts while training."})
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks that get prompts; all if left out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole; the task head is found if left out."}
    )
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes; filled in from the model.", "filled_in": True}
    )
    problem_type: str | None = field(
        default=None, metadata={"help": "Kind of classification; filled in from the model.", "filled_in": True}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start from the method's own initial values."})
    target_modules: str | None = field(
        default=None, metadata={"help": "Filled in from the backbone record.", "filled_in": True}
    )
    token_dim: int | None = field(
        default=None, metadata={"help": "Width of the tokens; filled in from the model.", "filled_in": True}
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "Number of blocks; filled in from the model.", "filled_in": True}
    )
    depths: list[int] | None = field(
        default=None, metadata={"help": "Blocks of each stage; filled in from the model.", "filled_in": True}
    )
    hf_vpt_version: str | None = field(
        default=None, metadata={"help": "Version that made the adapter; filled in.", "filled_in": True}
    )

    def __post_init__(self):
        super().__post_init__()
        # JSON gives a string back; PEFT compares members.
        self.peft_type = PeftType[self.method_name]
        if self.hf_vpt_version is None:
            from ... import __version__  # complete by now; this module is imported on the way there

            self.hf_vpt_version = __version__
        elif not isinstance(self.hf_vpt_version, str):
            self.fail("hf_vpt_version", "a version such as '0.1.0' or None")
        if self.task_type is not None:
            self.fail("task_type", "None: PEFT has no task type for images")
        if self.problem_type is not None:
            self.check_choice("problem_type", ProblemType)
        self.check_int("num_virtual_tokens", low=1)
        self.check_bool("deep")
        self.check_bool("init_weights")
        self.check_bool("pool_prompts")
        self.check_fraction("prompt_dropout")
        self.check_int("token_dim", low=1, optional=True)
        self.check_int("num_layers", low=1, optional=True)
        if self.num_layers is not None and self.num_layers > MAX_NUM_LAYERS:
            self.fail("num_layers", f"at most {MAX_NUM_LAYERS:,}")
        self.layers_to_transform = self._list_of("layers_to_transform", int)
        self.modules_to_save = self._list_of("modules_to_save", str)
        self.depths = self._list_of("depths", int)
        self.label_names = self._list_of("label_names", str)
        if self.label_names == []:
            self.fail("label_names", "at least one name or None")
        has_blocks = self.depths is None or min(self.depths, default=0) >= 1
        if not has_blocks or (self.depths is not None and self.num_layers not in (None, sum(self.depths))):
            self.fail("depths", f"positive numbers that add up to num_layers, which is {self.num_layers}")
        if self.layers_to_transform is not None:
            if not self.layers_to_transform or len(set(self.layers_to_transform)) < len(self.layers_to_transform):
                self.fail("layers_to_transform", "a list of different block indices with at least one entry")
            if not self.deep:
                self.fail("layers_to_transform", "None with deep=False: shallow prompts enter before block 0")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            self.fail("target_modules", "None: the blocks are found by the backbone record; see layers_to_transform")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Loads the config of a saved adapter, after a look at the adapter's weights.

        PEFT wraps the model before it opens the weights. A file that is truncated, holds NaN, lacks the head or does
        not fit its config is refused here instead, while the model is still as it was.

        Raises:
            ValueError: If the weights cannot be what the config says.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, PromptConfig):
            if config.base_model_name_or_path == DEMO:
                config.base_model_name_or_path = demo_backbone_path()
            config.saved_shapes = verify_checkpoint(
                config, os.fspath(pretrained_model_name_or_path), subfolder=subfolder, **kwargs
            )
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the config, and a model card in place of the empty one that PEFT wrote."""
        super().save_pretrained(save_directory, **kwargs)
        update_model_card(save_directory)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved: the packaged backbone is called `"demo"`, wherever the package lies."""
        fields = super().to_dict()
        if fields["base_model_name_or_path"] == demo_backbone_path():
            fields["base_model_name_or_path"] = DEMO
        return fields

    def resolved_layers(self, num_layers: int) -> list[int]:
        """Sorted indices of the blocks with prompts in a model of `num_layers` blocks.

        Raises:
            ValueError: If an index lies outside the model.
        """
        if not self.deep:
            return [0]
        if self.layers_to_transform is None:
            return list(range(num_layers))
        if any(not -num_layers <= index < num_layers for index in self.layers_to_transform):
            self.fail("layers_to_transform", f"indices from {-num_layers} to {num_layers - 1} in this model")
        layers = sorted({index % num_layers for index in self.layers_to_transform})
        if len(layers) < len(self.layers_to_transform):
            self.fail("layers_to_transform", f"different blocks; some are the same one among {num_layers}")
        return layers

    def stage(self, index: int) -> int:
        """Stage of the block with that index; 0 in a model without stages."""
        ends = itertools.accumulate(self.depths or [self.num_layers])
        return next(stage for stage, end in enumerate(ends) if index < end)

    def block_index(self, path: str) -> int:
        """Index of the block with that name, which ends in its number or in those of its stage and itself in it."""
        numbers = [int(part) for part in path.split(".") if part.isdecimal()]
        return numbers[-1] if self.depths is None else sum(self.depths[: numbers[-2]]) + numbers[-1]

    def layout(self, index: int, position: int, **backbone: Any) -> BlockLayout:
        """What prompts may know of a block.

        Args:
            index: Index of the block in the backbone.
            position: Index of the block among those with prompts of this adapter.
            backbone: What only the model can tell, see `BlockLayout`.
        """
        stage = self.stage(index)
        return BlockLayout(index, position, self.token_dim * 2**stage, stage, **backbone)

    def fail(self, name: str, needed: str) -> None:
        """Raises the error that names a field, its value and what is allowed."""
        found = repr(getattr(self, name))
        found = found if len(found) <= 300 else f"{found[:300]}…"
        raise ValueError(f"{type(self).__name__}.{name} is {found}. It must be {needed}.")

    def check_int(self, name: str, low: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            self.fail(name, f"an integer of at least {low}" + (" or None" if optional else ""))
        setattr(self, name, int(value))  # a number of numpy's would not go into JSON

    def check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            self.fail(name, "True or False")

    def check_fraction(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.fail(name, "a number from 0 up to, but not including, 1")

    def check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            self.fail(name, "a finite number above 0")

    def check_choice(self, name: str, choices: Any) -> None:
        check_choice(f"{type(self).__name__}.{name}", getattr(self, name), choices)

    def _list_of(self, name: str, kind: type) -> list | None:
        """The field as a list, from a list, tuple, set or single value of `kind`."""
        value = getattr(self, name)
        if value is None:
            return None
        kind = Integral if kind is int else kind
        values = [value] if isinstance(value, kind) else value
        if not isinstance(values, (list, tuple, set, range)) or any(
            isinstance(item, bool) or not isinstance(item, kind) for item in values
        ):
            self.fail(name, f"a list of {'integers' if kind is Integral else 'names'} or None")
        # Sets have no order; a saved config has to come out the same each time.
        ordered = sorted(values) if isinstance(values, set) else values
        return [int(item) if kind is Integral else item for item in ordered]
