"""What several runs of one process load once: the splits of a data set, and a backbone with its fresh head."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data import load_image_dataset
from .arguments import ModelArguments
from .models import load_classifier


class SharedLoader:
    """Loads data sets and backbones for run after run, the same ones only once.

    A run that gets its parts from here ends exactly as one that loads them itself: heads are drawn at random while a
    classifier is loaded, so a classifier is only used again where the random state is that of its first use, and the
    state after it is restored too. Runs with the same seed share a backbone, those with another one load it anew.

    One data set and one backbone are kept, those that were asked for last.

    Example:
        >>> shared = SharedLoader()
        >>> for settings in runs:
        ...     train_classifier(settings, shared)
    """

    def __init__(self) -> None:
        self._data: tuple[Any, dict[str, Any]] | None = None
        self._model: tuple[Any, PreTrainedModel, torch.Tensor] | None = None

    def load_image_dataset(self, name: str, **kwargs: Any) -> dict[str, Any]:
        """As `hf_vpt.data.load_image_dataset`. Streams, which remember where they are, are opened anew."""
        if kwargs.get("streaming"):
            return load_image_dataset(name, **kwargs)
        key = (name, sorted(kwargs.items()))
        if self._data is None or self._data[0] != key:
            self._data = (key, load_image_dataset(name, **kwargs))
        return dict(self._data[1])

    def load_classifier(self, model_args: ModelArguments, label_names: Sequence[str]) -> PreTrainedModel:
        """As `hf_vpt.training.load_classifier`. Quantised weights, which copies do not carry, are loaded anew."""
        if model_args.quantization != "none":
            return load_classifier(model_args, label_names)
        start = torch.get_rng_state()
        key = (dataclasses.astuple(model_args), tuple(label_names), start.numpy().tobytes())
        if self._model is None or self._model[0] != key:
            model = load_classifier(model_args, label_names)
            self._model = (key, model, torch.get_rng_state())
        _, model, end = self._model
        torch.set_rng_state(end)
        return copy.deepcopy(model)
