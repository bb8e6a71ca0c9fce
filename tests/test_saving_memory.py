"""What saves memory changes nothing, or little, of what is learned."""

import math

import pytest
import test_training
import torch
from conftest import assert_same
from test_training import trained_state

from hf_vpt.training import build_trainer
from hf_vpt.tuners import METHODS


# The tiny run of those tests.
backbone, images, settings = test_training.backbone, test_training.images, test_training.settings

# SGD, because Adam makes whole steps of rounding errors.
PLAIN = ["--optim", "sgd", "--learning_rate", "0.1", "--save_strategy", "no", "--no_load_best_model_at_end"]
WITHOUT_DROPOUT = {
    "vapt": ["--prompt_dropout", "0", "--channel_dropout", "0", "--projector_dropout", "0"],
    "provpt": ["--prompt_dropout", "0", "--relocation_warmup", "9"],
}


def without_dropout(method):
    return WITHOUT_DROPOUT.get(method, ["--prompt_dropout", "0"])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_training_stays_close_to_float32_and_keeps_the_adapter_in_float32(settings, method):
    learned, losses = [], []
    for options in ([], ["--bf16"]):
        trainer, _ = build_trainer(settings(method, *PLAIN, *without_dropout(method), *options))
        dtypes = set()
        layer = trainer.model.get_base_model().vit.layers[0].base_layer.mlp
        layer.register_forward_hook(lambda module, args, output, dtypes=dtypes: dtypes.add(output.dtype))
        trainer.train()
        assert dtypes == {torch.bfloat16 if options else torch.float32}
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        learned.append(trained_state(trainer.model))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert all(math.isfinite(loss) for loss in losses[1])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert_same(learned[1], learned[0], rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_learns_the_same_weights(settings, method):
    # With dropout: what is drawn must be drawn again when a block is computed anew.
    learned = []
    for options in ([], ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}']):
        trainer, _ = build_trainer(settings(method, *PLAIN, *options))
        runs = []
        layer = trainer.model.get_base_model().vit.layers[1].base_layer.mlp
        # Before, not after: computing anew stops as soon as nothing more is needed.
        layer.register_forward_pre_hook(lambda module, args, runs=runs: runs.append(module))
        trainer.train()
        learned.append((trained_state(trainer.model), len(runs)))
    assert_same(learned[1][0], learned[0][0], rtol=1e-5, atol=1e-7)
    assert learned[1][1] > learned[0][1], "no block was computed anew"


def test_reentrant_checkpointing_is_an_error_that_says_what_to_set(settings):
    options = ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']
    trainer, _ = build_trainer(settings("vpt", *options))
    with pytest.raises(ValueError, match=r"reentrant.*loses the gradient of prompts.*'use_reentrant': False"):
        trainer.train()
