"""What the loss feels the direction of alone, and steps that turn it."""

import copy
import json
import math

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, IMAGE_SIZE, output_of
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback

from hf_vpt import VAPTConfig, VPTConfig
from hf_vpt.training import (
    DirectionalSteps,
    ImageClassificationTrainer,
    LengthFloor,
    StepRecorder,
    TrainingArguments,
    build_trainer,
    directions_of,
    parse_arguments,
)
from hf_vpt.training.directions import turn_prompts
from hf_vpt.training.steps import STEPS_FILE
from hf_vpt.tuners.base import Direction


OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1),
}


def without_eps(model):
    """LayerNorm as in the formula: its eps feels a length."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.0
    return model


def adapted(backbone, adapter, **overrides):
    model = get_peft_model(backbone.build(), adapter.config(backbone=backbone, modules_to_save=[], **overrides))
    return without_eps(model.double().eval())


@pytest.fixture
def table():
    """A direction by row, `(3, 4)`, and what is learned with it: a target for each row's direction."""
    torch.manual_seed(0)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 4))
    target = nn.functional.normalize(torch.randn(3, 4), dim=1)
    return Direction(module, ("weight",)), lambda: -(nn.functional.normalize(module.weight, dim=1) * target).sum()


def angles_between(left, right):
    left, right = (nn.functional.normalize(tensor.double(), dim=1) for tensor in (left, right))
    return 2 * torch.asin((left - right).norm(dim=1) / 2)


@torch.no_grad()
def test_the_length_of_a_direction_changes_nothing(backbone, adapter, pixel_values):
    model = adapted(backbone, adapter)
    directions = directions_of(model)
    before = output_of(model, pixel_values.double())
    for direction in directions:
        rows = len(direction.tensors[0]) if direction.by_row else 1
        factors = 0.3 + 3 * torch.rand(rows, dtype=torch.float64)
        for tensor in direction.tensors:
            tensor.mul_(factors.reshape(-1, *[1] * (tensor.ndim - 1)))
    torch.testing.assert_close(output_of(model, pixel_values.double()), before, rtol=1e-7, atol=1e-9)
    expects = adapter.config().deep and backbone.record.norm is not None
    assert bool(directions) == expects


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_projected", "vapt", "provpt", "bpt_deep", "bpt_fixed"])
def test_the_gradient_of_a_direction_is_orthogonal_to_it_and_grows_as_it_shrinks(name, pixel_values):
    model = adapted(BACKBONES["vit"], ADAPTERS[name])
    slopes = []
    for factor in (1.0, 0.1):
        with torch.no_grad():
            for direction in directions_of(model)[:1]:
                for tensor in direction.tensors:
                    tensor.mul_(factor)
        model.zero_grad()
        output_of(model, pixel_values.double()).square().mean().backward()
        for direction in directions_of(model):
            rows = [t.reshape(len(t) if direction.by_row else 1, -1) for t in direction.tensors]
            gradients = [t.grad.reshape(len(row), -1) for t, row in zip(direction.tensors, rows)]
            rows, gradients = torch.cat(rows, 1).detach(), torch.cat(gradients, 1)
            assert (gradients.norm(dim=1) > 0).all()
            cosines = nn.functional.cosine_similarity(rows, gradients, dim=1)
            assert cosines.abs().max() < 1e-8
        slopes.append([[tensor.grad for tensor in direction.tensors] for direction in directions_of(model)])
    for number, (first, second) in enumerate(zip(*slopes)):
        for before, after in zip(first, second):
            torch.testing.assert_close(after, (1 if number else 10) * before, rtol=1e-6, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("module", ["norm.weight", "pooling.kernel", "projector.down.weight", "projector.up.weight"])
def test_the_other_tensors_of_vapt_are_felt_by_their_length(module, pixel_values):
    model = adapted(BACKBONES["vit"], ADAPTERS["vapt"])
    before = output_of(model, pixel_values.double())
    prompts = model.base_model.prompts()[1]
    prompts.get_parameter(module).mul_(2)
    assert (output_of(model, pixel_values.double()) - before).abs().max() > 1e-6


def test_with_an_activation_that_feels_lengths_vapt_has_its_static_prompts_alone():
    config = VAPTConfig(num_virtual_tokens=2, grid=[2, 3], projector_activation="gelu")
    model = get_peft_model(BACKBONES["vit"].build(), config)
    assert [d.names for d in directions_of(model)] == [("prompt_embeddings",)]


@torch.no_grad()
@pytest.mark.parametrize("block", range(4))
def test_of_pooled_prompts_those_of_the_last_block_alone_are_felt_by_their_length(block):
    config = VPTConfig(num_virtual_tokens=2, pool_prompts=True, init_weights=False, modules_to_save=[])
    model = without_eps(get_peft_model(BACKBONES["swin"].build(), config).double().eval())
    images = torch.randn(2, 3, *IMAGE_SIZE, dtype=torch.float64)
    before = output_of(model, images)
    prompts = model.base_model.prompts()[block]
    prompts.prompt_embeddings.mul_(2)
    change = (output_of(model, images) - before).abs().max()
    assert (change > 1e-4) if block == 3 else (change < 1e-9)
    assert any(d.module is prompts for d in directions_of(model)) == (block != 3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "adapter", "tensor"),
    [
        ("vit", "vpt_shallow", "prompt_embeddings"),
        ("vit", "bpt_shallow", "factor_prompts"),
        ("swinv2", "vpt_deep", "prompt_embeddings"),
        ("vit", "vpt_projected", "prompt_embeddings"),
    ],
)
def test_what_is_no_direction_is_felt_by_its_length(backbone, adapter, tensor, pixel_values):
    model = adapted(BACKBONES[backbone], ADAPTERS[adapter])
    before = output_of(model, pixel_values.double())
    model.base_model.prompts()[0].get_parameter(tensor).mul_(2)
    assert (output_of(model, pixel_values.double()) - before).abs().max() > 1e-6
    assert not any(tensor in direction.names for direction in directions_of(model))


def test_frozen_adapters_have_no_directions():
    model = get_peft_model(BACKBONES["vit"].build(), VPTConfig(num_virtual_tokens=2))
    assert len(directions_of(model)) == 3
    model.base_model.set_adapter("default", inference_mode=True)
    assert directions_of(model) == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["vpt_deep", "vpt_projected", "provpt", "bpt_deep"])
def test_setting_the_length_changes_no_output(name, pixel_values):
    model = adapted(BACKBONES["vit"], ADAPTERS[name])
    before = output_of(model, pixel_values.double())
    DirectionalSteps(directions_of(model), torch.optim.SGD(model.parameters(), lr=1.0), norm=0.7)
    torch.testing.assert_close(output_of(model, pixel_values.double()), before, rtol=1e-7, atol=1e-9)
    for direction in directions_of(model):
        rows = [t.reshape(len(t), -1) if direction.by_row else t.reshape(1, -1) for t in direction.tensors]
        lengths = torch.cat(rows, dim=1).square().mean(dim=1).sqrt()
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.7), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("theta", [1e-6, 0.1, 1.5])
def test_a_step_turns_each_row_by_the_angle(table, optimizer, theta):
    direction, loss = table
    optimizer = OPTIMIZERS[optimizer](direction.module.parameters(), theta)
    DirectionalSteps([direction], optimizer, norm=2.0, angle=True)
    for _ in range(3):
        before = direction.module.weight.detach().clone()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        after = direction.module.weight.detach()
        # Weights are float32, so a very small angle is rounded.
        torch.testing.assert_close(angles_between(before, after), torch.full((3,), theta).double(), rtol=0.05, atol=0)
        torch.testing.assert_close(after.square().mean(1).sqrt(), torch.full((3,), 2.0), rtol=2e-5, atol=0)


def test_the_first_step_of_sgd_is_the_formula_of_the_sphere(table):
    direction, loss = table
    optimizer = torch.optim.SGD(direction.module.parameters(), lr=0.3)
    DirectionalSteps([direction], optimizer, angle=True)
    p = direction.module.weight.detach().clone()
    loss().backward()
    g = direction.module.weight.grad.clone()
    optimizer.step()
    tangent = -(g - (g * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True) * p)
    unit = tangent / tangent.norm(dim=1, keepdim=True)
    expected = math.cos(0.3) * p + math.sin(0.3) * p.norm(dim=1, keepdim=True) * unit
    torch.testing.assert_close(direction.module.weight.detach(), expected)


def test_without_an_angle_a_step_is_the_optimizers_own_and_the_length_is_restored(table):
    direction, loss = table
    optimizer = torch.optim.SGD(direction.module.parameters(), lr=0.5, weight_decay=0.1)
    DirectionalSteps([direction], optimizer)
    p = direction.module.weight.detach().clone()
    loss().backward()
    g = direction.module.weight.grad.clone()
    optimizer.step()
    expected = p - 0.5 * g  # the gradient has no part along p here
    expected = expected * 2 / expected.norm(dim=1, keepdim=True)  # the root mean square of 4 elements is 1
    torch.testing.assert_close(direction.module.weight.detach(), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_does_not_touch_what_turns_and_does_touch_the_rest(table, optimizer):
    direction, loss = table
    ends = []
    for decay in (0.0, 0.5):
        turning = copy.deepcopy(direction.module)
        rest = nn.Parameter(torch.ones(2))
        made = OPTIMIZERS[optimizer]([turning.weight, rest], 0.1)
        made.param_groups[0]["weight_decay"] = decay
        DirectionalSteps([Direction(turning, ("weight",))], made, angle=True)
        for _ in range(3):
            made.zero_grad()
            (rest.sum() * 1e-3 - nn.functional.normalize(turning.weight, dim=1)[:, 0].sum()).backward()
            made.step()
        ends.append((turning.weight.detach().clone(), rest.detach().clone()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_a_row_without_a_gradient_stays_and_one_of_zeros_gets_a_direction(table):
    direction, _ = table
    with torch.no_grad():
        direction.module.weight[1] = 0
    optimizer = torch.optim.SGD(direction.module.parameters(), lr=0.1)
    DirectionalSteps([direction], optimizer, angle=True, seed=3)
    before = direction.module.weight.detach().clone()
    torch.testing.assert_close(before.square().mean(1), torch.ones(3), rtol=2e-5, atol=0)
    nn.functional.normalize(direction.module.weight[0], dim=0)[0].backward()
    optimizer.step()
    after = direction.module.weight.detach()
    assert torch.equal(after[1:], before[1:]) and not torch.equal(after[0], before[0])


def test_an_optimizer_that_measures_steps_by_weights_is_refused(table):
    class LAMB(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

    with pytest.raises(TypeError, match=r"optimizer LAMB.*needs one whose steps.*optim=sgd"):
        DirectionalSteps([table[0]], LAMB(table[0].module.parameters()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_floor_lifts_what_has_become_too_short_and_nothing_else(table, optimizer):
    direction, _ = table
    with torch.no_grad():
        direction.module.weight.copy_(torch.tensor([[3.0, 0, 0, 0], [0.1, 0.1, 0, 0], [0, 0, 0, 0]]))
    optimizer = OPTIMIZERS[optimizer](direction.module.parameters(), 0.0)
    LengthFloor([direction], optimizer, floor=0.5)
    direction.module.weight.grad = torch.ones(3, 4)
    optimizer.step()
    half = 0.5**0.5  # 0.5 of each of four elements is a length of 1
    expected = torch.tensor([[3.0, 0, 0, 0], [half, half, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(direction.module.weight.detach(), expected)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("--prompt_angle 0", "prompt_angle is 0.*above 0 and at most"),
        ("--prompt_angle 2", "prompt_angle is 2.*right angle"),
        ("--prompt_final_angle 0.1", "prompt_final_angle is 0.1 and prompt_angle None.*set both"),
        ("--prompt_angle 0.1 --prompt_final_angle 0.2", "prompt_final_angle is 0.2 and prompt_angle 0.1.*set both"),
        ("--prompt_norm 0", "prompt_norm is 0.*above 0"),
        ("--prompt_norm_floor -1", "prompt_norm_floor is -1.*above 0"),
        ("--prompt_norm_floor 1 --prompt_angle 0.1", "prompt_norm_floor is set beside prompt_angle.*leave"),
    ],
)
def test_angles_and_lengths_that_make_no_sense_are_refused(words, match):
    with pytest.raises(ValueError, match=match):
        parse_arguments(["--method", "vpt", "--output_dir", "unused", *words.split()])


@pytest.mark.parametrize("option", ["prompt_norm", "prompt_angle", "prompt_norm_floor"])
def test_options_for_prompts_are_refused_where_no_prompt_has_a_direction_alone(option, tmp_path):
    words = ["--method", "vpt", "--deep", "false", "--output_dir", str(tmp_path), "--use_cpu", f"--{option}", "0.1"]
    trainer, _ = build_trainer(parse_arguments(words))
    with pytest.raises(
        ValueError, match=f"Found {option} and nothing that it is for.*deep prompts.*leave {option} out"
    ):
        trainer.create_optimizer()


@pytest.mark.parametrize(("option", "length"), [("prompt_angle", 1.0), ("prompt_norm", 0.5)])
def test_a_prompt_that_moves_keeps_its_length_where_lengths_are_fixed(option, length, tmp_path):
    words = "--method provpt --num_virtual_tokens 2 --score attention --scoring online --use_cpu --num_train_epochs 3"
    words += f" --eval_strategy no --save_strategy no --no_load_best_model_at_end --{option} 0.5 --disable_tqdm 1"
    words += " --images_per_class 2 --per_device_train_batch_size 10"
    trainer, _ = build_trainer(parse_arguments([*words.split(), "--output_dir", str(tmp_path)]))
    tuner, lengths = trainer.model.base_model, []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            lengths.extend(p.prompt_embeddings.detach().square().mean(1).sqrt() for p in tuner.pool())

    trainer.add_callback(Watch())
    trainer.train()
    moves = json.loads((tmp_path / "relocations.json").read_text())
    assert any(move["target"] not in (None, move["source"]) for move in moves)
    torch.testing.assert_close(torch.cat(lengths), torch.full((sum(map(len, lengths)),), length), rtol=2e-5, atol=0)


def test_idleness_by_length_is_refused_where_lengths_are_fixed(tmp_path):
    words = ["--method", "provpt", "--score", "norm", "--output_dir", str(tmp_path), "--use_cpu", "--prompt_norm", "1"]
    trainer, _ = build_trainer(parse_arguments(words))
    with pytest.raises(ValueError, match=r"prompt_norm and score='norm'.*use score='attention'"):
        trainer.create_optimizer()


def test_deepspeed_is_refused(tmp_path):
    model = get_peft_model(BACKBONES["vit"].build(), VPTConfig(num_virtual_tokens=2))
    arguments = TrainingArguments(output_dir=str(tmp_path), prompt_angle=0.1, use_cpu=True)
    with pytest.raises(ValueError, match="prompt_angle and DeepSpeed.*fsdp2.yaml"):
        turn_prompts(torch.optim.SGD(model.parameters()), model, arguments, uses_deepspeed=True)


def test_an_optimizer_of_ones_own_does_not_turn_prompts_silently(tmp_path):
    model = get_peft_model(BACKBONES["vit"].build(), VPTConfig(num_virtual_tokens=2))
    arguments = TrainingArguments(output_dir=str(tmp_path), prompt_angle=0.1, use_cpu=True)
    optimizers = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(ValueError, match="optimizer of your own.*leave `optimizers` out"):
        ImageClassificationTrainer(model, arguments, eval_dataset=[], optimizers=optimizers)


def test_a_closure_which_would_see_no_prompts_is_refused(table):
    direction, loss = table
    optimizer = torch.optim.SGD(direction.module.parameters(), lr=0.1)
    DirectionalSteps([direction], optimizer)
    with pytest.raises(ValueError, match=r"optimizer.step\(closure\).*call step\(\) without"):
        optimizer.step(loss)


def test_a_step_that_ends_with_an_error_loses_no_prompt(table, monkeypatch):
    direction, loss = table
    optimizer = torch.optim.SGD(direction.module.parameters(), lr=0.1)
    DirectionalSteps([direction], optimizer, angle=True)
    before = direction.module.weight.detach().clone()
    loss().backward()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "_init_group", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    optimizer.step()
    angles = angles_between(before, direction.module.weight.detach())
    torch.testing.assert_close(angles, torch.full((3,), 0.1).double(), rtol=1e-3, atol=0)


def test_an_optimizer_turns_directions_once_and_must_have_them(table):
    direction, loss = table
    optimizer = torch.optim.SGD(direction.module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="1 tensors of directions that the optimizer does not have"):
        DirectionalSteps([direction], torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    steps = DirectionalSteps([direction], optimizer)
    with pytest.raises(ValueError, match="turns directions already.*call `remove`"):
        DirectionalSteps([direction], optimizer)
    steps.remove()
    p = direction.module.weight.detach().clone()
    loss().backward()
    optimizer.step()
    torch.testing.assert_close(direction.module.weight.detach(), p - 0.1 * direction.module.weight.grad)
    floor = LengthFloor([direction], optimizer, 5.0)
    torch.testing.assert_close(direction.module.weight.square().mean(1).sqrt().detach(), torch.full((3,), 5.0))
    floor.remove()
    DirectionalSteps([direction], optimizer)


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_projected", "vapt", "bpt_deep", "provpt"])
@pytest.mark.parametrize("option", ["angle", "norm", "floor"])
def test_a_run_does_to_prompts_what_its_options_say(name, option, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(BACKBONES["vit"].build(), ADAPTERS[name].config(modules_to_save=None))
    images = [{"pixel_values": torch.randn(3, *IMAGE_SIZE), "labels": index % 5} for index in range(8)]
    settings = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "use_cpu": True}
    settings |= {"learning_rate": 0.3, "num_train_epochs": 6, "warmup_epochs": 2, "disable_tqdm": True}
    settings |= {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0 if option == "angle" else 1.0}
    settings |= {
        "angle": {"prompt_angle": 0.2, "prompt_norm": 2.0, "prompt_final_angle": 0.02},
        "norm": {"prompt_norm": 2.0},
        "floor": {"prompt_norm_floor": 0.07, "lr_scheduler_type": "constant"},
    }[option]
    recorder = StepRecorder()
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    ImageClassificationTrainer(model, arguments, train_dataset=images, callbacks=[recorder]).train()
    for values in recorder.steps["directions"].values():
        if option == "angle":
            expected = [0, 0.1, 0.2, 0.2 * 0.1**0.25, 0.2 * 0.1**0.5, 0.2 * 0.1**0.75]
            assert values["turn"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert values["learning_rate"] == pytest.approx(expected)
        elif option == "norm":
            assert len(set(values["turn"])) > 3
        if option != "floor":
            assert values["length"] == pytest.approx([2.0] * 6, rel=2e-5)
        else:  # weight decay of 0.3 in each step
            assert min(values["length"]) > 0.0699 and values["length"][-1] < 0.2


def test_what_is_recorded_of_a_step_of_gradient_descent_is_the_formula(tmp_path):
    """tan(turn) = η·‖g‖·‖p‖ / ‖p‖², and ‖p‖² grows by η²‖g‖²."""
    model = get_peft_model(BACKBONES["vit"].build(), VPTConfig(num_virtual_tokens=1))
    without_eps(model)
    torch.manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 32, 48), "labels": index % 5} for index in range(8)]
    settings = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "use_cpu": True}
    settings |= {"optim": "sgd", "learning_rate": 2.0, "max_grad_norm": 0.0, "num_train_epochs": 3}
    arguments = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, **settings)
    recorder = StepRecorder()
    ImageClassificationTrainer(model, arguments, train_dataset=images, callbacks=[recorder]).train()
    assert json.loads((tmp_path / STEPS_FILE).read_text()) == recorder.steps
    assert len(recorder.steps["directions"]) == 3 and len(recorder.steps["loss"]) == 3
    for values in recorder.steps["directions"].values():
        assert max(values["cosine"]) < 1e-4
        for step in range(3):
            rate, length = values["learning_rate"][step], values["length"][step] * 16**0.5
            tangent = rate * values["gradient"][step] / length**2
            assert values["turn"][step] == pytest.approx(math.atan(tangent), rel=1e-3)
            if step < 2:
                longer = values["length"][step + 1] * 16**0.5
                assert longer == pytest.approx(length * (1 + tangent**2) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_with_weight_decay_random_gradients_turn_prompts_by_the_predicted_angle(optimizer):
    """√(2ηλ/(1+μ)) for SGD, √(2ηλ(1−β₁)/(1+β₁)) for AdamW: docs/learning_rate.md."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 512, dtype=torch.float64))
    rate, decay = (0.5, 0.05) if optimizer == "sgd" else (0.05, 0.5)
    if optimizer == "sgd":
        made = torch.optim.SGD([p], lr=rate, momentum=0.9, weight_decay=decay)
        expected = math.sqrt(2 * rate * decay / 1.9)
    else:
        made = torch.optim.AdamW([p], lr=rate, weight_decay=decay)
        expected = math.sqrt(2 * rate * decay * 0.1 / 1.9)
    turns = []
    for _ in range(400):
        before = p.detach().clone()
        random = torch.randn_like(p)
        unit = before / before.norm(dim=1, keepdim=True)
        tangent = random - (random * unit).sum(1, keepdim=True) * unit
        p.grad = tangent / before.norm(dim=1, keepdim=True)  # a slope that does not depend on the length
        made.step()
        turns.append(angles_between(before, p.detach()))
    late = torch.stack(turns[200:]).square().mean().sqrt().item()
    assert late == pytest.approx(expected, rel=0.05)
