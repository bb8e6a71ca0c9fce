"""Settings that are one of a few words are checked where they are set, in the same words everywhere."""

from typing import Literal

import pytest
import torch

from hf_vpt import BPTConfig
from hf_vpt.choices import check_choice
from hf_vpt.sweep.arguments import SweepArguments
from hf_vpt.training import DataArguments, ModelArguments, TrainingArguments
from hf_vpt.tuners.bpt.whitening import WhiteningStatistics


def test_a_word_that_is_no_choice_is_refused_with_the_choices():
    check_choice("speed", "fast", Literal["fast", "slow"])
    check_choice("speed", "slow", ("fast", "slow"))
    with pytest.raises(ValueError, match=r"speed is 'quick'. It must be one of \['fast', 'slow'\]: choose one"):
        check_choice("speed", "quick", Literal["fast", "slow"])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda word: ModelArguments(dtype=word), "dtype"),
        (lambda word: ModelArguments(quantization=word), "quantization"),
        (lambda word: DataArguments(augmentation=word), "augmentation"),
        (lambda word: DataArguments(preprocessing=word), "preprocessing"),
        (lambda word: DataArguments(broken_images=word), "broken_images"),
        (lambda word: DataArguments(cache_dtype=word), "cache_dtype"),
        (lambda word: TrainingArguments(lr_schedule_unit=word, use_cpu=True), "lr_schedule_unit"),
        (lambda word: SweepArguments(sampler=word), "sampler"),
        (lambda word: BPTConfig(basis=word), "BPTConfig.basis"),
        (lambda word: WhiteningStatistics(torch.eye(2), torch.eye(2), word), "estimate"),
    ],
)
def test_every_such_setting_is_checked_from_python_too(make, name):
    # Regression: dtype and quantization were checked by the command line alone, augmentation after the model loaded.
    with pytest.raises(ValueError, match=rf"^{name} is 'nonsense'. It must be one of \["):
        make("nonsense")
