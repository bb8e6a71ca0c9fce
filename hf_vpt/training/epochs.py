"""Which epoch it is, told to the training images."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SetEpoch(TrainerCallback):
    """Tells a map-style data set that has `set_epoch`, and its data loader, the epoch that begins.

    `Trainer` tells the loader, but only after the other callbacks, and Accelerate's loaders pass it on to the data set
    neither with several processes nor in an epoch that is resumed in its middle.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        dataset = getattr(train_dataloader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset):
            return  # passes over a stream are no epochs of Trainer's, whose `state.epoch` is then a part of the run
        epoch = int(state.epoch)
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(epoch)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
