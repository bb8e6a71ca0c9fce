"""What prompts may cost, counted and not timed: nobody brings the prompt tokens' queries and MLP back by accident."""

import copy
import time
import weakref

import pytest
import torch
from conftest import BACKBONES, IMAGE_SIZE
from peft import get_peft_model
from torch import nn

from hf_vpt import BPTConfig, PROVPTConfig, VAPTConfig, VPTConfig
from hf_vpt.benchmark import count_flops, count_saved_bytes, interleaved_seconds, peak_memory


B, T, N, D, RANK, BLOCKS, GRID = 4, 7, 5, 16, 2, 3, (2, 3)
ELEMENT = 4  # bytes of a float32
CONFIGS = {
    "vpt": VPTConfig(num_virtual_tokens=N),
    "provpt": PROVPTConfig(num_virtual_tokens=N, prompt_dropout=0.0),
    "bpt": BPTConfig(num_virtual_tokens=N, rank=RANK),
    "vapt": VAPTConfig(num_virtual_tokens=N, prompt_dropout=0.0, channel_dropout=0.0, projector_dropout=0.0),
}


def product(m: int, k: int, n: int) -> int:
    return 2 * m * k * n


# Once for the batch where prompts do not depend on the image: their keys and values; the queries of the tokens meet N
# more keys, and their weights N more values.
STATIC = 2 * product(N, D, D) + 2 * B * product(T, D, N)
PER_IMAGE = 2 * B * product(N, D, D) + 2 * B * product(T, D, N)
# The kernel of 2 × 2, moved over the mixing weights of 1 × 2 positions; mixing; the projector of width 8.
ADAPTIVE = 2 * 4 * N * 2 + B * product(N, GRID[0] * GRID[1], D) + 2 * B * product(N, D, 8)
FORWARD = {
    "vpt": BLOCKS * STATIC,
    "provpt": BLOCKS * STATIC,
    "bpt": BLOCKS * (STATIC + product(N, RANK, D)),
    # Its first block has static prompts.
    "vapt": STATIC + (BLOCKS - 1) * (PER_IMAGE + ADAPTIVE),
}


def floor() -> nn.Module:
    """The frozen backbone with a CLS token that trains, so that gradients flow through all blocks."""
    model = BACKBONES["vit"].build().requires_grad_(False).eval()
    model.vit.embeddings.cls_token.requires_grad_(True)
    model.classifier.requires_grad_(True)
    return model


def adapted(method: str, **settings) -> nn.Module:
    config = copy.deepcopy(CONFIGS[method])
    for name, value in settings.items():
        setattr(config, name, value)
    return get_peft_model(BACKBONES["vit"].build(), config).train()


def forward(model: nn.Module):
    pixels = torch.randn(B, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return lambda: model(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 3])).loss


def step(model: nn.Module):
    return lambda: forward(model)().backward()


@pytest.mark.parametrize("method", CONFIGS)
def test_a_forward_pass_costs_keys_values_and_attention_to_prompts_and_nothing_else(method):
    assert count_flops(forward(adapted(method))) - count_flops(forward(floor())) == FORWARD[method]


def test_concatenated_prompts_go_through_the_whole_block():
    model = adapted("vpt")
    model.base_model.set_insertion("tokens")
    query_and_output = 2 * B * product(N, D, D)
    mlp = 2 * B * product(N, D, 24)
    rows = 2 * B * product(N, D, T + N)
    # For each image, as tokens are.
    expected = BLOCKS * (PER_IMAGE + query_and_output + mlp + rows)
    assert count_flops(forward(model)) - count_flops(forward(floor())) == expected


@pytest.mark.parametrize("method", ["vpt", "provpt", "bpt"])
def test_a_training_step_computes_no_gradient_before_the_first_prompts(method):
    # The tokens of block 0 come from what is frozen, so its projections have no gradient to pass on.
    not_needed = 3 * B * product(T, D, D)
    attention = BLOCKS * 2 * B * product(T, D, N)
    # Flash attention computes its weights once more in its backward pass: five products for two.
    backward = attention // 2 * 5 + BLOCKS * 2 * product(N, D, D)
    if method == "bpt":
        backward += BLOCKS * 2 * product(N, RANK, D)
    assert count_flops(step(adapted(method))) - count_flops(step(floor())) == FORWARD[method] + backward - not_needed


def test_a_training_step_of_prompts_in_the_last_block_goes_back_through_that_block_alone():
    last, all_blocks = adapted("vpt", layers_to_transform=[2]), adapted("vpt")
    backward = count_flops(step(last)) - count_flops(forward(last))
    assert backward < (count_flops(step(all_blocks)) - count_flops(forward(all_blocks))) / 2


P = GRID[0] * GRID[1]
KEYS_VALUES = 2 * B * N * D
# Keys and values for each image, and two statistics of a norm for each prompt; what the norm of block 0 would keep of
# the tokens is not needed, as they come from what is frozen.
KEPT = {"vpt": BLOCKS * (KEYS_VALUES + 2 * N) - B * T * (D + 2)}
KEPT["provpt"] = KEPT["vpt"]
# The product of its factors.
KEPT["bpt"] = KEPT["vpt"] + BLOCKS * N * D
# Patches as their norm leaves them with its statistics, kernel and mixing in one matrix, pooled prompts, the
# projector's width of 8, and the prompts with the statistics of the block's norm, which are as many as images.
KEPT["vapt"] = KEPT["vpt"] + (BLOCKS - 1) * (B * P * (D + 2) + N * P + B * N * (D + 8 + D + 2) - 2 * N)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_training_step_keeps_keys_values_and_the_prompts_themselves(method):
    kept = count_saved_bytes(forward(model := adapted(method)), model)
    bare = count_saved_bytes(forward(reference := floor()), reference)
    assert kept - bare == ELEMENT * KEPT[method]


def test_concatenated_prompts_keep_far_more():
    model, tokens = adapted("vpt"), adapted("vpt")
    tokens.base_model.set_insertion("tokens")
    bare = count_saved_bytes(forward(reference := floor()), reference)
    more = count_saved_bytes(forward(model), model) - bare
    assert count_saved_bytes(forward(tokens), tokens) - bare > 4 * more


def test_what_was_counted_is_given_back():
    alive = []

    def run():
        output = torch.ones(3, requires_grad=True).exp()  # which keeps its own output
        alive.append(weakref.ref(output))
        return output.sum()

    assert count_saved_bytes(run, nn.Identity()) == 3 * ELEMENT
    assert alive[0]() is None


def test_peak_memory_sees_what_was_allocated_and_given_back():
    def allocate():
        torch.ones(50 * 2**20 // 4).sum()

    if (grown := peak_memory(allocate)) is None:
        pytest.skip("resident memory is read on Linux only")
    assert 45 * 2**20 < grown < 70 * 2**20
    assert peak_memory(lambda: None) < 5 * 2**20


def test_computations_are_timed_in_turn_and_none_always_after_the_same_other():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abcd"}
    seconds = interleaved_seconds(runs, repeats=7, warmup=1)
    rounds = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert len(rounds) == 8
    assert all(sorted(names) == list("abcd") for names in rounds)
    for name in "abcd":
        before = [calls[index - 1] for index in range(1, len(calls)) if calls[index] == name]
        assert max(map(before.count, before)) <= 5, name
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abcd", 7)


def test_processor_time_leaves_out_what_others_take():
    runs = {"waits": lambda: time.sleep(0.2)}
    assert interleaved_seconds(runs, repeats=1, warmup=0)["waits"][0] >= 0.2
    assert interleaved_seconds(runs, repeats=1, warmup=0, clock="processor")["waits"][0] < 0.1
