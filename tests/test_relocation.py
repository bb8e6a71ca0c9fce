"""PRO-VPT's relocation while training: the published procedure by hand, online, resumed, told to reporters."""

import copy
import json

import pytest
import torch
import transformers
from by_hand import concatenate_run_strip
from conftest import BACKBONES, IMAGE_SIZE, StopAt, assert_same
from peft import get_peft_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_vpt import PROVPTConfig, VPTConfig
from hf_vpt.training import ImageClassificationTrainer, RelocationCallback, TrainingArguments
from hf_vpt.tuners.provpt import PPOAllocation, PromptScores, RandomAllocation, Relocator, ThompsonAllocation


VIT = BACKBONES["vit"]
NUM_BLOCKS, NUM_PROMPTS = 3, 3


def prompted(**settings) -> nn.Module:
    """A tiny ViT with three small random prompts in each of its three blocks; small, so that gate scores are not."""
    settings = {"num_virtual_tokens": NUM_PROMPTS, "prompt_dropout": 0.0, "relocation_warmup": 0} | settings
    torch.manual_seed(0)
    model = get_peft_model(VIT.build(layer_norm_eps=1e-6), PROVPTConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    for prompts in model.base_model.pool():
        prompts.prompt_embeddings.data.copy_(0.003 * torch.randn(NUM_PROMPTS, 16, generator=generator))
    return model


def images(number: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"pixel_values": torch.randn(3, *IMAGE_SIZE, generator=generator), "labels": index % 5}
        for index in range(number)
    ]


def batches(size: int = 4) -> list[dict[str, torch.Tensor]]:
    data = images()
    return [
        {
            "pixel_values": torch.stack([image["pixel_values"] for image in data[start : start + size]]),
            "labels": torch.tensor([image["labels"] for image in data[start : start + size]]),
        }
        for start in range(0, len(data), size)
    ]


def train(model: nn.Module, folder, data=None, callbacks=(), resume=None, **settings):
    """Train with momentum in the order of the images; return the trainer and its relocation callback."""
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.25,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
    } | settings
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, **settings)
    trainer = ImageClassificationTrainer(
        model=model, args=arguments, train_dataset=data or images(), callbacks=list(callbacks)
    )
    relocation = RelocationCallback(trainer)
    trainer.add_callback(relocation)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, relocation


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    return state | {f"block {p.index}": p.block.clone() for p in model.base_model.pool()}


class PublishedProcedure:
    """PRO-VPT (arXiv 2503.06901) written out for a ViT with gates, concatenation and plain loops."""

    def __init__(self, model: nn.Module):
        self.prompts = [row.clone() for p in model.base_model.pool() for row in p.prompt_embeddings.detach()]
        self.blocks = [block for block in range(NUM_BLOCKS) for _ in range(NUM_PROMPTS)]
        head = model.base_model.model.classifier.modules_to_save["default"]
        self.head = [head.weight.detach().clone(), head.bias.detach().clone()]
        self.momentum = None
        self.bare = copy.deepcopy(model).unload().eval().requires_grad_(False)
        self.actor, self.draws = PPOAllocation(NUM_BLOCKS, 0).actor, torch.Generator().manual_seed(0)

    def loss(self, prompts: list[torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        by_block = [[p for p, b in zip(prompts, self.blocks, strict=True) if b == block] for block in range(3)]
        tables = {block: torch.stack(table) for block, table in enumerate(by_block) if table}
        hidden = self.bare.vit.embeddings(batch["pixel_values"])
        hidden = concatenate_run_strip(self.bare, hidden, tables)
        logits = self.bare.vit.layernorm(hidden)[:, 0] @ self.head[0].T + self.head[1]
        return nn.functional.cross_entropy(logits, batch["labels"])

    def score(self) -> tuple[torch.Tensor, float]:
        total, loss_sum = torch.zeros(len(self.prompts)), 0.0
        for parameter in self.head:
            parameter.requires_grad_()
        for batch in batches():
            gates = torch.ones(len(self.prompts), requires_grad=True)
            loss = self.loss([g * p for g, p in zip(gates, self.prompts, strict=True)], batch)
            gradients = torch.autograd.grad(loss, [gates, *self.head])
            norm = torch.stack([g.norm() for g in gradients]).norm()
            total += gradients[0] * min(1.0, 0.25 / norm.item())
            loss_sum += loss.item() / len(batch["labels"])
        return total / len(batches()), loss_sum

    def choose(self, scores: torch.Tensor, leaving: int) -> int:
        sums = torch.stack([scores[torch.tensor(self.blocks) == block].sum() for block in range(NUM_BLOCKS)])
        counts = torch.tensor([self.blocks.count(block) for block in range(NUM_BLOCKS)]).float()
        left = nn.functional.one_hot(torch.tensor(self.blocks[leaving]), NUM_BLOCKS).float()
        state = torch.cat([(sums - sums.mean()) / sums.std(correction=0), (counts - left) / 8, left])
        with torch.no_grad():
            return int(torch.multinomial(self.actor(state).softmax(dim=0), 1, generator=self.draws))

    def train(self) -> None:
        for batch in batches():
            parameters = [*self.prompts, *self.head]
            gradients = torch.autograd.grad(self.loss([p.requires_grad_() for p in self.prompts], batch), parameters)
            factor = min(1.0, 0.25 / torch.stack([g.norm() for g in gradients]).norm().item())
            gradients = [factor * gradient for gradient in gradients]
            if self.momentum is None:
                self.momentum = gradients
            else:
                self.momentum = [0.9 * m + g for m, g in zip(self.momentum, gradients, strict=True)]
            for parameter, momentum in zip(parameters, self.momentum, strict=True):
                parameter.data -= 0.01 * momentum


def test_two_epochs_of_training_are_the_published_procedure_replayed_by_hand(tmp_path):
    model = prompted(relocation_scale=0.1)
    hand, expected, loss_then = PublishedProcedure(model), [], None
    trainer, relocation = train(model, tmp_path)
    for _ in range(2):
        scores, loss = hand.score()
        leaving = int(scores.argmax())
        source = hand.blocks[leaving]
        reward = None if loss_then is None else loss_then - loss - scores[leaving].item()
        assert scores[leaving] > 0
        loss_then = loss
        sums = [scores[torch.tensor(hand.blocks) == block].sum().item() for block in range(NUM_BLOCKS)]
        hand.blocks[leaving] = hand.choose(scores, leaving)
        if hand.blocks[leaving] != source:
            hand.prompts[leaving].data *= 0.1
        expected.append((leaving, source, hand.blocks[leaving], scores[leaving].item(), reward, loss, sums))
        hand.train()
    assert any(source != target for _, source, target, *_ in expected), "nothing has moved"
    for found, (prompt, source, target, score, reward, loss, sums) in zip(relocation.rounds, expected, strict=True):
        assert (found["prompt"], found["source"], found["target"]) == (prompt, source, target)
        assert found["score"] == pytest.approx(score, rel=1e-3)
        assert found["reward"] == (None if reward is None else pytest.approx(reward, abs=1e-5))
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["block_scores"] == pytest.approx(sums, rel=1e-2, abs=abs(score) * 1e-3)
    pool = model.base_model.pool()
    assert [block for prompts in pool for block in prompts.serves] == hand.blocks
    # Prompts of one block may stand in another order, which attention does not see.
    found = torch.cat([prompts.prompt_embeddings.detach() for prompts in pool])
    torch.testing.assert_close(found, torch.stack(hand.prompts).detach(), rtol=1e-4, atol=1e-6)
    head = model.base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(head.weight.detach(), hand.head[0].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["gate", "attention", "norm"])
def test_online_scores_equal_those_of_a_pass_of_its_own(kind, checkpointing):
    model = prompted(score=kind)
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    expected = model.base_model.score_prompts(batches())
    with model.base_model.record_scores(online=True) as recorder:
        for batch in batches():
            loss = model(**batch).loss
            loss.backward()
            recorder.collect(loss, len(batch["labels"]))
            model.zero_grad()
            with torch.no_grad():
                model(**batch)  # an evaluation in between is not listened to
    found = recorder.result()
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-12)
    assert found.loss == pytest.approx(expected.loss)
    assert (found.online, expected.online) == (True, False)
    assert found.values.abs().max() > 0


def test_online_scores_of_accumulated_and_scaled_batches_are_those_of_the_large_batch():
    model = prompted()
    expected = model.base_model.score_prompts(batches(size=12))
    with model.base_model.record_scores(online=True) as recorder:
        total = 0
        for batch in batches(size=4):
            loss = model(**batch).loss / 3
            (1024 * loss).backward()
            total = total + loss.detach()
        recorder.collect(total, 12, loss_scale=1024)
    torch.testing.assert_close(recorder.result().values, expected.values, rtol=1e-4, atol=1e-12)
    assert recorder.result().loss == pytest.approx(expected.loss)


@pytest.mark.parametrize("clip", [0.25, None])
def test_a_step_that_overflows_is_left_out_of_the_scores(clip):
    model = prompted(score_clip=clip)
    with model.base_model.record_scores(online=True) as recorder:
        for number, batch in enumerate(batches()):
            loss = model(**batch).loss
            (loss * (float("inf") if number == 1 else 1)).backward()
            recorder.collect(loss, 4)
            model.zero_grad()
    expected = model.base_model.score_prompts([batches()[0], batches()[2]])
    torch.testing.assert_close(recorder.result().values, expected.values, rtol=1e-4, atol=1e-12)
    assert recorder.num_batches == 2


def test_a_pass_of_its_own_does_not_end_listening_to_training():
    model = prompted()
    expected = model.base_model.score_prompts(batches())
    with model.base_model.record_scores(online=True) as recorder:
        for batch in batches():
            model.base_model.score_prompts(batches())
            loss = model(**batch).loss
            loss.backward()
            recorder.collect(loss, 4)
            model.zero_grad()
    torch.testing.assert_close(recorder.result().values, expected.values, rtol=1e-4, atol=1e-12)
    assert all(block.observer is None for block in model.base_model.prompted_blocks())


def test_collecting_where_no_prompt_was_heard_is_an_error():
    model = prompted()
    loss = model(**batches()[0]).loss
    loss.backward()
    message = "no gradients of prompts.*within the recorder's `with` block"
    with model.base_model.record_scores(online=True) as recorder, pytest.raises(ValueError, match=message):
        recorder.collect(loss, 4)


def test_collecting_after_gradients_are_gone_is_an_error():
    model = prompted()
    with model.base_model.record_scores(online=True) as recorder:
        loss = model(**batches()[0]).loss
        loss.backward()
        model.zero_grad()
        with pytest.raises(ValueError, match=r"no gradients of the head.*before `zero_grad`.*score_clip"):
            recorder.collect(loss, 4)


@pytest.mark.parametrize("kind", ["gate", "attention", "norm"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_online_moves_what_scores_of_the_epoch_before_say(tmp_path, kind, accumulation):
    # Without learning, the scores of an epoch are those of a pass before it. Scores are clipped as gradients of the
    # whole step, before training clips those.
    model = prompted(score=kind, scoring="online")
    expected = copy.deepcopy(model).eval().base_model.score_prompts(batches(size=4))
    _, relocation = train(
        model,
        tmp_path,
        learning_rate=0.0,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    (found,) = relocation.rounds
    assert (found["epoch"], found["step"]) == (1, 3)
    assert found["prompt"] == int(expected.values.argmax())
    assert found["score"] == pytest.approx(expected.values.max().item(), rel=1e-3)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-4)
    assert found["target"] is not None


def test_separate_scores_of_accumulated_batches_are_those_of_the_large_batch(tmp_path):
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        found.append(train(prompted(), tmp_path, **settings)[1].rounds)
    for one, other in zip(*found, strict=True):
        assert (one["prompt"], one["target"]) == (other["prompt"], other["target"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["score"] == pytest.approx(other["score"], rel=1e-3)


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.5}, {}], ids=["smoothed", "plain"])
def test_separate_scores_are_those_of_the_loss_that_is_trained_on(tmp_path, settings):
    _, separate = train(prompted(), tmp_path, learning_rate=0.0, **settings)
    _, online = train(prompted(scoring="online"), tmp_path, learning_rate=0.0, **settings)
    assert separate.rounds[0]["loss"] == pytest.approx(online.rounds[0]["loss"], rel=1e-5)


def test_online_scores_need_a_trainer_that_tells_of_backward_passes(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    trainer = transformers.Trainer(prompted(scoring="online"), arguments, train_dataset=images())
    trainer.add_callback(RelocationCallback(trainer))
    with pytest.raises(ValueError, match="online' and a Trainer.*ImageClassificationTrainer, or scoring='separate'"):
        trainer.train()


def test_separate_scores_work_with_any_trainer(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, num_train_epochs=2, save_strategy="no", remove_unused_columns=False
    )
    trainer = transformers.Trainer(prompted(), arguments, train_dataset=images())
    relocation = RelocationCallback(trainer)
    trainer.add_callback(relocation)
    trainer.train()
    assert len(relocation.rounds) == 2


def test_relocation_of_an_adapter_of_another_method_is_an_error(tmp_path):
    model = get_peft_model(VIT.build(), VPTConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="Found a VPTModel.*PROVPTConfig, or leave RelocationCallback out"):
        train(model, tmp_path)


class Fail(TrainerCallback):
    """Breaks training off in the middle of a step."""

    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_run_after_one_that_broke_off_begins_anew(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    model = prompted(scoring="online", score_clip=None)
    expected = copy.deepcopy(model)
    _, first = train(expected, tmp_path, **settings)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, callbacks=[Fail()], **settings)
    assert all(block.observer is None for block in model.base_model.prompted_blocks())
    _, second = train(model, tmp_path, **settings)
    assert second.rounds == first.rounds
    assert_same(trained_state(model), trained_state(expected), rtol=0, atol=0)


def test_a_trainer_that_trains_twice_begins_anew_with_its_moves(tmp_path):
    model = prompted(scoring="online", relocation_warmup=2, allocation="random")
    trainer, relocation = train(model, tmp_path, learning_rate=0.0, num_train_epochs=4)
    first = relocation.rounds
    trainer.train()
    assert [move["target"] is None for move in relocation.rounds] == [True, False, False]
    assert relocation.rounds[0]["reward"] is None
    assert [move["prompt"] for move in relocation.rounds] == [move["prompt"] for move in first]


def test_online_a_warm_up_of_one_epoch_ends_when_one_epoch_has_been_trained():
    relocator = Relocator(RandomAllocation(3), warmup=1, scale=0.1)
    pool = prompted().base_model.pool()
    scores = PromptScores(torch.ones(9, dtype=torch.float64), 1.0)
    assert relocator.decide(pool, scores).target is None
    relocator = Relocator(RandomAllocation(3), warmup=1, scale=0.1)
    online = PromptScores(torch.ones(9, dtype=torch.float64), 1.0, online=True)
    assert relocator.decide(pool, online).target is not None


def test_a_decision_moves_nothing_until_it_is_applied():
    model = prompted(allocation="random", allocation_seed=3)
    relocator, pool = model.base_model.relocator(), model.base_model.pool()
    before = trained_state(model)
    move = relocator.decide(pool, PromptScores(torch.zeros(9, dtype=torch.float64), 1.0))
    assert_same(trained_state(model), before, rtol=0, atol=0)
    assert move.target != move.source
    relocator.apply(pool, move)
    assert list(model.base_model.distribution().values()) == move.distribution


def test_random_moves_take_any_prompt_to_any_block_whatever_the_scores():
    model = prompted(allocation="random")
    scores = PromptScores(-torch.ones(9, dtype=torch.float64), 1.0)
    moves = [model.base_model.relocate(scores) for _ in range(60)]
    assert {move.prompt for move in moves} == set(range(9))
    assert {move.target for move in moves} == {0, 1, 2}


@pytest.mark.parametrize("policy_class", [PPOAllocation, ThompsonAllocation, RandomAllocation])
def test_a_policy_restored_half_way_goes_on_as_if_it_had_never_stopped(policy_class, tmp_path):
    def go_on(policy, rewards):
        generator = torch.Generator().manual_seed(1)
        actions = []
        for reward in rewards:
            actions.append(policy.act(torch.randn(9, generator=generator, dtype=torch.float64)))
            policy.observe(reward)
        return actions

    first = policy_class(3, seed=1)
    go_on(first, [0.5, -1.0, 2.0])
    # Through a file, from which nothing but tensors and plain values is read.
    torch.save(first.state_dict(), tmp_path / "policy.pt")
    second = policy_class(3, seed=2)
    second.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    rewards = [1.0, -0.5, 0.25, 0.0, -2.0, 1.0, 0.5, 0.75]
    assert go_on(second, rewards) == go_on(first, rewards)


@pytest.mark.parametrize("step", [3, 4, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scoring": "online"},
        {"scoring": "online", "score": "attention", "allocation": "thompson"},
        {"scoring": "online", "relocation_steps": 2, "score": "norm", "allocation": "random"},
    ],
    ids=["separate", "online", "online-attention-thompson", "steps-norm-random"],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_end(tmp_path, settings, step):
    settings = {"prompt_dropout": 0.2, **settings}
    common = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 1}
    uninterrupted = prompted(**settings)
    _, expected = train(uninterrupted, tmp_path / "whole", **common)
    train(prompted(**settings), tmp_path / "parts", callbacks=[StopAt(step)], **common)
    resumed = prompted(**settings)
    _, found = train(resumed, tmp_path / "parts", resume=str(tmp_path / f"parts/checkpoint-{step}"), **common)
    assert found.rounds == expected.rounds
    assert_same(trained_state(resumed), trained_state(uninterrupted), rtol=0, atol=0)
    assert (tmp_path / "parts/relocations.json").read_text() == (tmp_path / "whole/relocations.json").read_text()
    assert any(move["target"] not in (None, move["source"]) for move in found.rounds), "nothing has moved"


class Stream(IterableDataset):
    """Images without a known number."""

    def __iter__(self):
        yield from images()


def test_a_stream_without_epochs_moves_prompts_every_so_many_steps(tmp_path):
    model = prompted(scoring="online", relocation_steps=5, allocation="random")
    _, relocation = train(model, tmp_path, data=Stream(), max_steps=12)
    assert [move["step"] for move in relocation.rounds] == [5, 10]
    assert sum(model.base_model.distribution().values()) == 9


class Reporter(TrainerCallback):
    """Keeps what is logged, as TensorBoard and the like do."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_every_round_is_told_to_reporters_in_numbers_and_kept_for_plots(tmp_path, capsys):
    model, reporter = prompted(relocation_scale=0.1), Reporter()
    trainer, _ = train(model, tmp_path, callbacks=[reporter], num_train_epochs=4)
    logs = [entry for entry in reporter.logs if "relocation_prompt" in entry]
    assert len(logs) == 4
    assert all(isinstance(value, (int, float)) for entry in logs for value in entry.values())
    assert {"relocation_source", "relocation_target", "relocation_score"} <= logs[0].keys()
    assert "relocation_reward" in logs[1]
    assert sum("relocation_policy_loss" in entry for entry in logs) == 1  # PPO learns after every second reward
    assert sum(logs[-1][f"relocation_prompts_in_block_{block}"] for block in range(3)) == 9
    assert capsys.readouterr().out.count("relocation_target") == 4
    assert [entry for entry in trainer.state.log_history if "relocation_prompt" in entry][-1]["epoch"] == 3
    rounds = json.loads((tmp_path / "relocations.json").read_text())
    assert [entry["epoch"] for entry in rounds] == [0, 1, 2, 3]
    assert rounds[-1]["distribution"] == list(model.base_model.distribution().values())
    assert [sum(entry["distribution"]) for entry in rounds] == 4 * [9]
