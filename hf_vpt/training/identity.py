"""What a run must not change on the way."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..data.arguments import DataArguments
from .arguments import ModelArguments


DATA_FIELDS = ("dataset_name", "dataset_config_name", "dataset_revision", "dataset_variant")
DATA_FIELDS += ("image_column", "label_column")
PREPARATION_FIELDS = ("preprocessing", "broken_images")
SPLIT_FIELDS = ("validation_fraction", "test_fraction", "split_seed", "streaming", "num_held_out")
SPLIT_FIELDS += ("images_per_class", "validation_images_per_class", "train_on_validation")


class RunIdentity(TrainerCallback):
    """Lets a run go on from a checkpoint only with the method, the backbone and the division of data it began with.

    With another division, images that were trained on could be among those that are tested on, and scores of images
    that are prepared in another way do not continue those before. Everything else, such
    as the learning rate or the number of epochs, may change.

    Args:
        model: Which backbone, by which method.
        data: Which data, and how they are divided.
    """

    def __init__(self, model: ModelArguments, data: DataArguments):
        self.settings: dict[str, Any] = {name: getattr(model, name) for name in ("method", "model_name_or_path")}
        self.settings |= {name: getattr(data, name) for name in (*DATA_FIELDS, *PREPARATION_FIELDS, *SPLIT_FIELDS)}

    def state_dict(self) -> dict[str, Any]:
        return self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the settings that a checkpoint was made with.

        Raises:
            ValueError: One of them has changed.
        """
        changed = [name for name, value in self.settings.items() if name in state and state[name] != value]
        if changed:
            found = ", ".join(f"{name} {state[name]}" for name in changed)
            wanted = ", ".join(f"{name} {self.settings[name]}" for name in changed)
            raise ValueError(
                f"Found a checkpoint made with {found}, and a run with {wanted}. A run goes on with the method, the "
                "backbone and the division of data that it began with: use another output_dir, or the old settings."
            )
