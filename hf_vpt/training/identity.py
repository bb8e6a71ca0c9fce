"""What a run must not change on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from .parsing import Settings
from .record import describe_settings


DATA_FIELDS = ("dataset_name", "dataset_config_name", "dataset_revision", "dataset_variant")
DATA_FIELDS += ("image_column", "label_column")
PREPARATION_FIELDS = ("preprocessing", "augmentation", "broken_images")
SPLIT_FIELDS = ("validation_fraction", "test_fraction", "split_seed", "streaming", "num_held_out")
SPLIT_FIELDS += ("images_per_class", "validation_images_per_class", "train_on_validation")

# Checkpoints of versions that did not have these are of runs without them.
LATER_FIELDS = ("prompt_angle", "prompt_final_angle", "prompt_norm", "prompt_norm_floor")


class RunIdentity(TrainerCallback):
    """Lets a run go on from a checkpoint only with the method, the backbone, the data and the settings it began with.

    With another division of the data, images that were trained on could be among those that are tested on, and scores
    of images that are prepared in another way do not continue those before. Learning rates, weight decays and the
    like come back with the optimizer's state, whatever the settings say, so results would tell of settings, or of a
    seed, that nothing was trained with. Lengths, batches, evaluations and whatever only costs time may change.

    Args:
        settings: What `parse_arguments` returns.
    """

    def __init__(self, settings: Settings):
        self.settings: dict[str, Any] = {
            name: getattr(settings.model, name) for name in ("method", "model_name_or_path")
        }
        names = (*DATA_FIELDS, *PREPARATION_FIELDS, *SPLIT_FIELDS)
        self.settings |= {name: getattr(settings.data, name) for name in names}
        self.settings |= {"seed": settings.training.seed, **describe_settings(settings)}

    def state_dict(self) -> dict[str, Any]:
        return self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the settings that a checkpoint was made with.

        Raises:
            ValueError: One of them has changed.
        """
        state = dict.fromkeys(LATER_FIELDS) | dict(state)
        # A checkpoint of an older version tells fewer of the others.
        both = self.settings.keys() & state.keys()
        known, own = ({name: settings[name] for name in both} for settings in (state, self.settings))
        if changed := tell_apart(known, own):
            raise ValueError(
                f"Found a checkpoint made with {changed[0]}, and a run with {changed[1]}. A run goes on with the "
                "method, the backbone, the data and the settings that it began with: use another output_dir, or the "
                "old settings."
            )


def tell_apart(known: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say of two runs or sweeps in which settings they differ, each with its own values; None if in none."""
    changed = sorted(key for key in known.keys() | own.keys() if known.get(key) != own.get(key))
    if not changed:
        return None
    found, wanted = (", ".join(f"{key} {settings.get(key)}" for key in changed) for settings in (known, own))
    return found, wanted
