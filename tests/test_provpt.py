"""PRO-VPT moves the prompt that its paper says, by scores computed another way here, and loses nothing on the way."""

import copy

import numpy as np
import pytest
import torch
from conftest import BACKBONES, IMAGE_SIZE, output_of
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_vpt import PROVPTConfig, VPTConfig
from hf_vpt.tuners.provpt import (
    PPOAllocation,
    PromptScores,
    PROVPTModel,
    Relocator,
    ThompsonAllocation,
    policy_state,
)


VIT = BACKBONES["vit"]


def prompted(dtype: torch.dtype = torch.float64, deviation: float = 0.1, eps: float = 1e-6, **settings) -> nn.Module:
    """A tiny ViT with three random prompts in each of its three blocks."""
    model = VIT.build(layer_norm_eps=eps).to(dtype)
    settings = {"num_virtual_tokens": 3, "prompt_dropout": 0.0, "score_clip": None} | settings
    model = get_peft_model(model, PROVPTConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    for prompts in model.base_model.prompts().values():
        values = torch.randn(prompts.prompt_embeddings.shape, generator=generator, dtype=torch.float64)
        prompts.prompt_embeddings.data.copy_(deviation * values)
    return model


def batches_of(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = (4, 2)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "pixel_values": torch.randn(size, 3, *IMAGE_SIZE, generator=generator, dtype=torch.float64).to(dtype),
            "labels": torch.randint(5, (size,), generator=generator),
        }
        for size in sizes
    ]


def scores_like(model: nn.Module, values: list[float], loss: float = 1.0) -> PromptScores:
    return PromptScores(torch.tensor(values, dtype=torch.float64), loss)


def move(model: nn.Module, owner: int, row: int, target: int, scale: float = 1.0) -> None:
    model.base_model.prompts()[owner].move(row, target, scale)


def tables_of(model: nn.Module) -> dict[int, torch.Tensor]:
    """The prompts of each block, picked one by one from all prompts by the block that they serve."""
    pool = model.base_model.prompts()
    tables = {index: [] for index in pool}
    for prompts in pool.values():
        for prompt, block in zip(prompts.prompt_embeddings.detach(), prompts.block.tolist(), strict=True):
            tables[block].append(prompt)
    return {i: torch.stack(table) if table else torch.empty(0, 16).double() for i, table in tables.items()}


def in_pool_order(model: nn.Module, by_block: dict[int, torch.Tensor]) -> torch.Tensor:
    """Numbers of the prompts, listed block by block as in `tables_of`, in the order of the pool."""
    remaining = {index: list(values) for index, values in by_block.items()}
    pool = model.base_model.prompts().values()
    return torch.stack([remaining[block].pop(0) for prompts in pool for block in prompts.block.tolist()])


def loss_by_hand(
    model: nn.Module,
    tables: dict[int, torch.Tensor],
    batch: dict[str, torch.Tensor],
    biases: dict[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Loss in float64 of the bare backbone on [prefix, P_i, patches], with attention and its logits written out."""
    bare = copy.deepcopy(model).unload().double().eval().requires_grad_(False)
    hidden = bare.vit.embeddings(batch["pixel_values"].double())
    for index, block in enumerate(bare.vit.layers):
        table = tables[index]
        prompts = table.expand(len(hidden), -1, -1) if table.ndim == 2 else table
        tokens = torch.cat([hidden[:, :1], prompts, hidden[:, 1:]], dim=1)
        normed, attention = block.layernorm_before(tokens), block.attention
        heads = [
            projection(normed).unflatten(-1, (2, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        logits = heads[0] @ heads[1].mT / 8**0.5
        if biases is not None:
            logits = logits + nn.functional.pad(biases[index], (1, hidden.shape[1] - 1))
        mixed = logits.exp() / logits.exp().sum(dim=-1, keepdim=True) @ heads[2]
        tokens = tokens + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.layernorm_after(tokens))
        hidden = torch.cat([tokens[:, :1], tokens[:, 1 + prompts.shape[1] :]], dim=1)
    head = model.base_model.model.classifier
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    logits = bare.vit.layernorm(hidden)[:, 0] @ weight.T + bias
    return -logits.log_softmax(dim=-1)[range(len(logits)), batch["labels"]].mean()


def gate_scores_by_hand(model: nn.Module, batch: dict[str, torch.Tensor], tables=None) -> torch.Tensor:
    """Gradient to a factor 1 on each prompt, in float64 and in the order of the pool."""
    tables = tables_of(model) if tables is None else tables
    tables = {index: table.double() for index, table in tables.items()}
    gates = {index: torch.ones(t.shape[-2], 1, dtype=torch.float64, requires_grad=True) for index, t in tables.items()}
    loss = loss_by_hand(model, {index: gates[index] * table for index, table in tables.items()}, batch)
    gradients = torch.autograd.grad(loss, list(gates.values()))
    return in_pool_order(model, {i: g[:, 0] for i, g in zip(tables, gradients, strict=True)})


# Scores


@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "after moves"])
@pytest.mark.parametrize("deviation", [0.003, 0.1])
def test_gate_scores_equal_the_gradient_to_a_factor_on_the_prompt(deviation, moved):
    model = prompted(deviation=deviation)
    if moved:
        move(model, 0, 1, 2)
        move(model, 2, 0, 1, scale=1e-3)
    batches = batches_of()
    expected = sum(gate_scores_by_hand(model, batch) for batch in batches) / len(batches)
    assert expected.abs().max() > 1e-9
    found = model.base_model.score_prompts(batches).values
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-14)


def test_gate_scores_equal_a_finite_difference():
    model, batch = prompted(deviation=0.003), batches_of()[0]
    found = model.base_model.score_prompts([batch]).values
    for prompt in (0, 4, 8):
        losses = []
        for gate in (1 + 1e-4, 1 - 1e-4):
            tables = tables_of(model)
            tables[prompt // 3][prompt % 3] *= gate
            losses.append(loss_by_hand(model, tables, batch))
        assert found[prompt].item() == pytest.approx((losses[0] - losses[1]).item() / 2e-4, rel=1e-4)


def test_gate_scores_stay_accurate_in_single_precision_for_prompts_of_deviation_1():
    model, batch = prompted(torch.float32, deviation=1.0), batches_of(torch.float32)[0]
    expected = gate_scores_by_hand(model, batch)
    found = model.base_model.score_prompts([batch]).values
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_gate_scores_are_right_where_the_plain_inner_product_is_rounding_noise(eps):
    model, batch = prompted(torch.float32, deviation=1.0, eps=eps), batches_of(torch.float32)[0]
    found = model.base_model.score_prompts([batch]).values
    model(**batch).loss.backward()
    tables = [prompts.prompt_embeddings for prompts in model.base_model.prompts().values()]
    plain = torch.cat([(table.grad * table.detach()).sum(dim=1) for table in tables]).double()
    double = {"pixel_values": batch["pixel_values"].double(), "labels": batch["labels"]}
    expected = prompted(deviation=1.0, eps=eps).base_model.score_prompts([double]).values
    if eps == 1e-6:  # a smaller one float64 does not resolve either
        torch.testing.assert_close(expected, gate_scores_by_hand(prompted(deviation=1.0), double), rtol=1e-6, atol=0)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-3 * scale
    assert (plain - expected).abs().max() > 1e-2 * scale, "the plain product would do"


def test_gate_scores_of_prompts_with_dropout_use_the_masks_of_the_forward_pass():
    model, batch = prompted(deviation=0.003, prompt_dropout=0.5).train(), batches_of()[0]
    dropped = {}
    for index, prompts in model.base_model.prompts().items():
        prompts.register_forward_hook(lambda *args, index=index: dropped.update({index: args[2].detach()}))
    found = model.base_model.score_prompts([batch]).values
    assert dropped[0].shape == (4, 3, 16)
    torch.testing.assert_close(found, gate_scores_by_hand(model, batch, dropped), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "after moves"])
def test_attention_scores_equal_the_gradient_to_a_bias_on_the_logits(moved):
    model, batches = prompted(score="attention"), batches_of()
    if moved:
        move(model, 0, 1, 2)
        move(model, 2, 0, 1)
    tables, expected = tables_of(model), 0
    for batch in batches:
        biases = {i: torch.zeros(len(table), dtype=torch.float64, requires_grad=True) for i, table in tables.items()}
        gradients = torch.autograd.grad(loss_by_hand(model, tables, batch, biases), list(biases.values()))
        expected = expected + in_pool_order(model, dict(zip(tables, gradients, strict=True))) / len(batches)
    torch.testing.assert_close(model.base_model.score_prompts(batches).values, expected, rtol=1e-8, atol=1e-12)


def test_attention_scores_equal_a_finite_difference():
    model, batch = prompted(score="attention"), batches_of()[0]
    tables, found = tables_of(model), model.base_model.score_prompts([batch]).values
    for prompt in (1, 5, 6):
        losses = []
        for step in (1e-4, -1e-4):
            biases = {index: torch.zeros(3).double() for index in tables}
            biases[prompt // 3][prompt % 3] = step
            losses.append(loss_by_hand(model, tables, batch, biases))
        assert found[prompt].item() == pytest.approx((losses[0] - losses[1]).item() / 2e-4, rel=1e-4)


def test_norm_scores_are_minus_the_share_in_the_norms_of_the_block():
    model = prompted(score="norm")
    move(model, 1, 0, 2)
    pool = list(model.base_model.prompts().values())
    rows = [(p.prompt_embeddings[r].detach().norm().item(), p.block[r].item()) for p in pool for r in range(3)]
    expected = [-norm / sum(other for other, b in rows if b == block) for norm, block in rows]
    found = model.base_model.score_prompts(batches_of()).values
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["gate", "attention"])
def test_each_batch_is_clipped_as_torch_clips_scores_and_head_together(kind):
    model, clip = prompted(deviation=0.003, score=kind, score_clip=None), 0.01
    head = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    assert len(head) == 2
    batches, expected = batches_of(), 0
    for batch in batches:
        scores = nn.Parameter(torch.zeros(9, dtype=torch.float64))
        scores.grad = model.base_model.score_prompts([batch]).values
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in head]
        for parameter, gradient in zip(copies, torch.autograd.grad(model(**batch).loss, head), strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_([scores, *copies], clip)
        assert norm > 2 * clip, "nothing to clip"
        expected = expected + scores.grad / len(batches)
    model.peft_config["default"].score_clip = clip
    torch.testing.assert_close(model.base_model.score_prompts(batches).values, expected, rtol=1e-6, atol=1e-14)


def test_small_gradients_are_not_clipped():
    model = prompted(deviation=0.003)
    free = model.base_model.score_prompts(batches_of()).values
    model.peft_config["default"].score_clip = 1e6
    torch.testing.assert_close(model.base_model.score_prompts(batches_of()).values, free, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["gate", "attention", "norm"])
def test_the_loss_of_the_scores_is_the_sum_of_mean_loss_by_batch_size(kind):
    model, batches = prompted(score=kind), batches_of(sizes=(4, 2, 1))
    expected = sum(loss_by_hand(model, tables_of(model), b).item() / len(b["labels"]) for b in batches)
    assert model.base_model.score_prompts(batches).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["gate", "attention", "norm"])
@pytest.mark.parametrize("training", [True, False])
def test_scoring_changes_no_parameter_no_gradient_and_no_mode(kind, training):
    model = prompted(score=kind, prompt_dropout=0.1).train(training)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 7)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        model.base_model.score_prompts(batches_of())
    for name, parameter in model.named_parameters():
        value, requires_grad = before[name]
        assert torch.equal(parameter, value) and parameter.requires_grad == requires_grad, name
        assert (parameter.grad is not None) == requires_grad, name
        assert parameter.grad is None or bool((parameter.grad == 7).all()), name
    assert model.training == training
    assert all(block.observer is None for block in model.base_model.prompted_blocks())


def test_a_loss_of_ones_own_is_scored_instead_of_the_models():
    model, batches = prompted(deviation=0.003), batches_of()
    doubled = model.base_model.score_prompts(batches, compute_loss=lambda m, batch: 2 * m(**batch).loss)
    single = model.base_model.score_prompts(batches)
    torch.testing.assert_close(doubled.values, 2 * single.values)
    assert doubled.loss == pytest.approx(2 * single.loss)


def test_a_recorder_in_a_training_loop_gives_the_scores_of_a_pass_of_its_own():
    model, batches = prompted(deviation=0.003), batches_of()
    expected = model.base_model.score_prompts(batches)
    with model.base_model.record_scores() as recorder:
        for batch in batches:
            loss = model(**batch).loss
            recorder.add(loss, len(batch["labels"]), retain_graph=True)
            loss.backward()
    torch.testing.assert_close(recorder.result().values, expected.values)
    assert model.base_model.prompts()[0].prompt_embeddings.grad is not None


def test_scores_of_no_batch_are_an_error():
    with pytest.raises(ValueError, match="no batches"):
        prompted().base_model.score_prompts([])


def test_scores_need_prompts_as_keys_and_values():
    model = prompted()
    model.base_model.set_insertion("tokens")
    with pytest.raises(ValueError, match="set_insertion"):
        model.base_model.score_prompts(batches_of())


def test_scores_need_the_adapter_to_be_the_only_active_one_and_enabled():
    model = prompted(modules_to_save=[])
    model.add_adapter("other", PROVPTConfig(num_virtual_tokens=2, modules_to_save=[]))
    with pytest.raises(ValueError, match="other"):
        model.base_model.score_prompts(batches_of(), adapter_name="other")
    with model.disable_adapter(), pytest.raises(ValueError):
        model.base_model.score_prompts(batches_of())
    model.base_model.score_prompts(batches_of())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError):
        model.base_model.score_prompts(batches_of())


# Moves


def test_relocation_moves_only_the_chosen_prompt_and_scales_it():
    model = prompted(relocation_warmup=0)
    before = torch.cat([p.prompt_embeddings.detach().clone() for p in model.base_model.prompts().values()])
    result = model.base_model.relocate(scores_like(model, [-1, 0.1, 0, 0, 0.5, -2, 0, 0, 0]))
    after = torch.cat([p.prompt_embeddings.detach() for p in model.base_model.prompts().values()])
    assert (result.prompt, result.score, result.source) == (4, 0.5, 1)
    others = [k for k in range(9) if k != 4]
    assert torch.equal(after[others], before[others])
    torch.testing.assert_close(after[4], before[4] * (1 if result.target == 1 else 1e-3))


def test_the_number_of_prompts_stays_the_same_over_many_moves():
    model, generator = prompted(relocation_warmup=0, allocation="thompson"), torch.Generator().manual_seed(0)
    targets = set()
    for _ in range(12):
        values = torch.rand(9, generator=generator).tolist()
        result = model.base_model.relocate(scores_like(model, values))
        targets.add(result.target)
        assert sum(result.distribution) == 9
        assert model.base_model.distribution() == dict(enumerate(result.distribution))
        served = [r for prompts in model.base_model.prompts().values() for r in prompts.rows()]
        assert sorted(served) == [(owner, row) for owner in range(3) for row in range(3)]
    assert len(targets) > 1, "the policy always names the same block"


def test_moved_prompts_act_in_their_new_block_and_an_emptied_block_works():
    model, batch = prompted(), batches_of()[0]
    for row in range(3):
        move(model, 1, row, 2 if row else 0)
    assert model.base_model.distribution() == {0: 4, 1: 0, 2: 5}
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(loss_by_hand(model, tables_of(model), batch).item(), rel=1e-9)
    model.base_model.set_insertion("tokens")
    torch.testing.assert_close(model(**batch).loss, loss)
    model.base_model.set_insertion("keys_values")
    loss.backward()
    for prompts in model.base_model.prompts().values():
        assert prompts.prompt_embeddings.grad.abs().amin(dim=0).max() > 0
    assert model.base_model.score_prompts([batch]).values.isfinite().all()


@pytest.mark.parametrize("insertion", ["keys_values", "tokens"])
def test_an_emptied_block_computes_what_the_bare_block_does(insertion):
    model = prompted(prompt_dropout=0.5).train()
    model.base_model.set_insertion(insertion)
    for row in range(3):
        move(model, 1, row, 0)
    block, hidden = model.base_model.prompted_blocks()[1], torch.randn(2, 7, 16, dtype=torch.float64)
    assert torch.equal(block(hidden), block.base_layer(hidden))
    assert model(**batches_of()[0]).loss.isfinite()


def test_a_prompt_that_comes_back_is_where_it_was(pixel_values):
    model = prompted(torch.float32)
    before = output_of(model, pixel_values)
    for block in (2, 0, 1):
        move(model, 1, 1, block)
    assert model.base_model.distribution() == {0: 3, 1: 3, 2: 3}
    assert torch.equal(output_of(model, pixel_values), before)


def test_a_moved_prompt_gets_its_gradient_through_its_new_block():
    model, batch = prompted(), batches_of()[0]
    move(model, 0, 2, 1)
    tables = {index: table.requires_grad_() for index, table in tables_of(model).items()}
    loss_by_hand(model, tables, batch).backward()
    model(**batch).loss.backward()
    found = torch.cat([p.prompt_embeddings.grad for p in model.base_model.prompts().values()])
    expected = in_pool_order(model, {index: table.grad for index, table in tables.items()})
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    assert found[2].abs().max() > 1e-6


def test_momentum_stays_with_the_prompt_that_moves():
    model, batches = prompted(relocation_warmup=0), batches_of()
    pool = model.base_model.prompts()
    optimizer = torch.optim.SGD([p.prompt_embeddings for p in pool.values()], lr=0.5, momentum=0.9)
    values = [prompt for p in pool.values() for prompt in p.prompt_embeddings.detach().clone()]
    momenta = [torch.zeros(16).double() for _ in values]
    for step in range(3):
        if step == 1:
            move(model, 0, 1, 2, scale=1e-3)
            values[1] = values[1] * 1e-3
        optimizer.zero_grad()
        model(**batches[step % 2]).loss.backward()
        gradients = [gradient for p in pool.values() for gradient in p.prompt_embeddings.grad]
        momenta = [0.9 * momentum + gradient for momentum, gradient in zip(momenta, gradients, strict=True)]
        values = [value - 0.5 * momentum for value, momentum in zip(values, momenta, strict=True)]
        optimizer.step()
    found = torch.cat([p.prompt_embeddings.detach() for p in pool.values()])
    torch.testing.assert_close(found, torch.stack(values))


def test_the_distribution_survives_saving_and_loading(tmp_path, pixel_values):
    model = prompted(torch.float32)
    move(model, 1, 0, 0)
    move(model, 2, 2, 0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(VIT.build(layer_norm_eps=1e-6), tmp_path).eval()
    assert loaded.base_model.distribution() == {0: 5, 1: 2, 2: 2}
    torch.testing.assert_close(output_of(loaded, pixel_values), output_of(model, pixel_values), rtol=0, atol=0)


def test_the_distribution_survives_a_deepcopy_and_then_goes_its_own_way(pixel_values):
    model = prompted(torch.float32)
    move(model, 1, 0, 0)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(output_of(twin, pixel_values), output_of(model, pixel_values), rtol=0, atol=0)
    move(twin, 1, 1, 0)
    assert twin.base_model.distribution() == {0: 5, 1: 1, 2: 3}
    assert model.base_model.distribution() == {0: 4, 1: 2, 2: 3}
    assert (output_of(twin, pixel_values) - output_of(model, pixel_values)).abs().max() > 1e-6


def test_a_pool_over_some_blocks_moves_prompts_among_them_only():
    model = prompted(layers_to_transform=[0, 2], relocation_warmup=0, allocation="thompson")
    targets = set()
    for step in range(10):
        scores = PromptScores(torch.arange(6, dtype=torch.float64).roll(step), 1.0)
        targets.add(model.base_model.relocate(scores).target)
        assert sum(model.base_model.distribution().values()) == 6
    assert targets == {0, 2}


# Epochs


class FakePolicy:
    """Names the blocks it was told to, and remembers what it was shown."""

    def __init__(self, actions: list[int]):
        self.actions = iter(actions)
        self.states: list[torch.Tensor] = []
        self.rewards: list[float] = []

    def act(self, state: torch.Tensor) -> int:
        self.states.append(state)
        return next(self.actions)

    def observe(self, reward: float) -> float | None:
        self.rewards.append(reward)
        return 0.25 if len(self.rewards) == 2 else None


def test_five_epochs_replayed_by_hand():
    config = PROVPTConfig(num_virtual_tokens=2, token_dim=16, num_layers=3)
    torch.manual_seed(0)
    pool = list(PROVPTModel.make_all_prompts(config).values())
    start = torch.cat([p.prompt_embeddings.detach().clone() for p in pool])
    policy = FakePolicy([2, 1, 0])
    relocator = Relocator(policy, warmup=1, scale=0.1)

    def step(loss, *values):
        return relocator.step(pool, PromptScores(torch.tensor(values, dtype=torch.float64), loss))

    # Epoch 0 is warm-up: a positive score, but no move and no question to the policy.
    result = step(9.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0)
    assert (result.target, result.reward, result.distribution) == (None, None, [2, 2, 2])
    assert policy.states == []

    # Epoch 1: prompt 0 of block 0 goes to block 2; nothing has moved yet, so there is no reward.
    result = step(8.0, 0.5, 0.25, 0.0, 0.0, -1.0, 0.0)
    assert (result.prompt, result.source, result.target, result.reward) == (0, 0, 2, None)
    assert result.distribution == [1, 2, 3]

    # Epoch 2: reward (8 − 7.5) − 0.125; prompt 3 of block 1 stays in block 1, as the policy wants it.
    result = step(7.5, 0.0, 0.0, 0.0, 0.125, 0.0, -1.0)
    assert (result.prompt, result.source, result.target) == (3, 1, 1)
    assert (result.reward, result.policy_loss) == (0.375, None)
    assert result.distribution == [1, 2, 3]

    # Epoch 3: reward (7.5 − 7.75) − (−0.5); no score is positive, so nothing moves.
    result = step(7.75, -0.5, -1.0, -1.0, -1.0, -1.0, -1.0)
    assert (result.prompt, result.source, result.target) == (0, 2, None)
    assert (result.reward, result.policy_loss) == (0.25, 0.25)
    assert result.distribution == [1, 2, 3]

    # Epoch 4: no move before it, so no reward; prompt 0 goes home again.
    result = step(7.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert (result.prompt, result.source, result.target, result.reward) == (0, 2, 0, None)
    assert result.distribution == [2, 2, 2]

    assert policy.rewards == [0.375, 0.25]
    assert len(policy.states) == 3
    # Counts without the leaving prompt, and the block that it leaves.
    torch.testing.assert_close(policy.states[0][3:], torch.tensor([1, 2, 2, 5, 0, 0]).double() / 5)
    torch.testing.assert_close(policy.states[1][3:], torch.tensor([1, 1, 3, 0, 5, 0]).double() / 5)
    torch.testing.assert_close(policy.states[2][3:], torch.tensor([1, 2, 2, 0, 0, 5]).double() / 5)
    expected = start.clone()
    expected[0] *= 0.1 * 0.1
    torch.testing.assert_close(torch.cat([p.prompt_embeddings.detach() for p in pool]), expected)


def test_norm_scores_move_the_prompt_with_the_largest_one_though_none_is_positive():
    model = prompted(score="norm", relocation_warmup=0)
    result = model.base_model.relocate(model.base_model.score_prompts(batches_of()))
    assert result.score < 0
    assert result.target is not None


@pytest.mark.parametrize("kind", ["gate", "attention"])
def test_gradient_scores_move_nothing_where_none_is_positive(kind):
    model = prompted(score=kind, relocation_warmup=0)
    result = model.base_model.relocate(scores_like(model, [-1.0, -2.0, 0.0] + 6 * [-3.0]))
    assert (result.prompt, result.target, result.distribution) == (2, None, [3, 3, 3])


def test_the_policy_state_of_a_hand_example():
    # Sums of the blocks 2, 0, 4, 2: mean 2, population deviation sqrt(2). Prompt 3 leaves block 2.
    scores = torch.tensor([1.0, 1.0, 1.0, 3.0, 2.0])
    state = policy_state(scores, torch.tensor([0, 0, 2, 2, 3]), num_blocks=4, leaving=3)
    root = 2**0.5
    expected = [0, -root, root, 0, 0.5, 0, 0.25, 0.25, 0, 0, 1, 0]
    assert state.tolist() == pytest.approx(expected, abs=1e-7)


# Policies


def test_thompson_counts_a_reward_that_is_not_negative_as_a_success():
    policy, successes, failures = ThompsonAllocation(3, seed=1), [1, 1, 1], [1, 1, 1]
    draws = np.random.default_rng(1)
    for reward in (0.5, -0.5, 0.0, 2.0, -1e-9, 0.1):
        action = policy.act(torch.zeros(9))
        assert action == int(np.argmax([draws.beta(s, f) for s, f in zip(successes, failures, strict=True)]))
        policy.observe(reward)
        (successes if reward >= 0 else failures)[action] += 1
        assert (policy.successes.tolist(), policy.failures.tolist()) == (successes, failures)


def test_thompson_prefers_the_block_that_is_rewarded():
    policy = ThompsonAllocation(4)
    for _ in range(200):
        policy.observe(1.0 if policy.act(torch.zeros(12)) == 2 else -1.0)
    assert sum(policy.act(torch.zeros(12)) == 2 for _ in range(50)) >= 45


def test_ppo_learns_to_prefer_the_block_that_is_rewarded():
    policy = PPOAllocation(3, horizon=8, gamma=0.0, epochs=15, actor_lr=3e-3)
    state = torch.linspace(-1, 1, 9)
    before = policy.actor(state).softmax(dim=-1)[2].item()
    assert 0.2 < before < 0.5
    losses = [policy.observe(1.0 if policy.act(state) == 2 else 0.0) for _ in range(96)]
    assert [loss is not None for loss in losses] == 12 * (7 * [False] + [True]), "learned at another time"
    assert policy.actor(state).softmax(dim=-1)[2].item() > 0.8


def test_the_loss_of_one_ppo_step_is_the_formula_written_out():
    policy, states = PPOAllocation(3, epochs=1), torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probs, values = policy.actor(states).log_softmax(dim=-1), policy.critic(states)[:, 0]
    actions = torch.tensor([2, 0])
    # Old log-probabilities that make these ratios; the clip to 1.2 and 0.8 counts in both steps.
    ratios = [1.5, 0.5]
    old = torch.stack([log_probs[0, 2], log_probs[1, 0]]) - torch.tensor(ratios).log()
    returns = [0.3 - 0.2, -0.2]
    mean, deviation = sum(returns) / 2, abs(returns[0] - returns[1]) / 2**0.5
    returns = [(value - mean) / (deviation + 1e-8) for value in returns]
    expected = 0.0
    for step in range(2):
        advantage = returns[step] - values[step].item()
        clipped = min(max(ratios[step], 0.8), 1.2)
        entropy = -sum(p.exp() * p for p in log_probs[step]).item()
        expected += -min(ratios[step] * advantage, clipped * advantage) / 2
        expected += 0.5 * (values[step].item() - returns[step]) ** 2 / 2 - 0.01 * entropy / 2
    assert policy.update(states, actions, old, values, [0.3, -0.2]) == pytest.approx(expected, rel=1e-5)


def test_ppo_learns_after_every_second_reward_also_under_no_grad():
    policy, learned = PPOAllocation(3, epochs=2), []
    with torch.no_grad():
        for reward in (1.0, -1.0, 0.5, 2.0):
            before = policy.actor[0].weight.clone()
            policy.act(torch.linspace(-1, 1, 9))
            loss = policy.observe(reward)
            learned.append(loss is not None)
            assert torch.equal(policy.actor[0].weight, before) == (loss is None)
    assert learned == [False, True, False, True]


@pytest.mark.parametrize("settings", [{"horizon": 1}, {"gamma": 1.5}, {"gamma": -0.1}, {"clip_epsilon": 0.0}], ids=str)
def test_a_ppo_policy_that_cannot_learn_is_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name} (is )?{value}"):
        PPOAllocation(3, **settings)


def test_two_ppo_policies_of_one_seed_do_the_same_and_leave_torchs_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second, third = (PPOAllocation(4, seed=seed) for seed in (3, 3, 4))
    states = [torch.linspace(-1, 1, 12) * scale for scale in range(20)]
    actions = [[policy.act(state) for state in states] for policy in (first, second, third)]
    assert actions[0] == actions[1] != actions[2]
    assert torch.equal(torch.rand(3), expected)


# The whole


def test_a_plain_loop_as_in_the_readme_learns_separable_images():
    torch.manual_seed(0)
    labels = torch.arange(8) % 2
    images = 0.3 * torch.randn(8, 3, *IMAGE_SIZE) + (2 * labels - 1)[:, None, None, None]
    batches = [{"pixel_values": images[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4)]
    model = get_peft_model(VIT.build(), PROVPTConfig(num_virtual_tokens=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses, moves = [], 0
    for _ in range(6):
        model.train()
        move = model.base_model.relocate(model.base_model.score_prompts(batches))
        moves += move.target not in (None, move.source)
        assert sum(move.distribution) == 6
        for batch in batches:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-2:]) < 0.3 * sum(losses[:2]), losses
    assert moves, "no prompt moved"


def test_without_moves_it_computes_what_vpt_deep_does(pixel_values):
    model = prompted(torch.float32)
    vpt = get_peft_model(VIT.build(layer_norm_eps=1e-6), VPTConfig(num_virtual_tokens=3)).eval()
    for index, prompts in vpt.base_model.prompts().items():
        prompts.prompt_embeddings.data.copy_(model.base_model.prompts()[index].prompt_embeddings)
    torch.testing.assert_close(output_of(model, pixel_values), output_of(vpt, pixel_values), rtol=0, atol=0)


def test_a_vit_b_tunes_as_many_numbers_as_the_paper_says():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    model = get_peft_model(model, PROVPTConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 184_320
