"""Prompts in Swin and Swin-v2 act in every window as if written into it by hand, and belong to their image."""

import copy
import pickle

import pytest
import torch
from by_hand import SwinByHand, leaves, prompted, tables_of
from conftest import ADAPTERS, BACKBONES, output_of
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SwinModel, Swinv2Model

from hf_vpt import BPTConfig, PROVPTConfig, VAPTConfig, VPTConfig, initialize_whitening
from hf_vpt.tuners.bpt import WhiteningStatistics, whitening_matrix
from hf_vpt.tuners.provpt import PromptScores


# As the model is made for it, and pixels, an odd grid of 9 × 13 patches and its windows that are all padded.
IMAGES = {"8 × 12": (32, 48), "padded everywhere": (33, 50)}
EXACT = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(params=["swin", "swinv2"])
def swin(request):
    return BACKBONES[request.param]


def images(height: int = 32, width: int = 48, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def double(backbone, **settings) -> nn.Module:
    """A bare model in float64; its second stage and the logit scale of Swin-v2 differ from head to head."""
    model = backbone.build(**{"attn_implementation": backbone.attn_implementations[-1], **settings}).double()
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            nn.init.uniform_(parameter, 0.0, 6.0)  # beyond log(100), where it is cut off
    return model


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return (logits * torch.arange(logits.numel(), dtype=logits.dtype).view_as(logits).cos()).sum()


def check_against_hand(backbone, pixel_values, run_settings=None, model_settings=None, **settings) -> None:
    """Logits, and the gradient of every prompt, equal those of the model written by hand."""
    model = prompted(double(backbone, **(model_settings or {})), **settings)
    bare = double(backbone, **(model_settings or {}))
    bare.classifier.load_state_dict(model.base_model.model.classifier.original_module.state_dict())
    tables = leaves(tables_of(model))
    expected = SwinByHand(bare).run(pixel_values, tables, **(run_settings or {}))
    found = output_of(model, pixel_values)
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found - output_of(bare, pixel_values)).abs().max() > 1e-3, "the prompts changed nothing"
    loss_of(found).backward()
    loss_of(expected).backward()
    for index, prompts in model.base_model.prompts().items():
        if tables[index].numel():
            torch.testing.assert_close(prompts.prompt_embeddings.grad, tables[index].grad, **EXACT, msg=f"{index}")


# Windows


@pytest.mark.parametrize("size", IMAGES.values(), ids=IMAGES)
def test_the_model_written_by_hand_is_the_bare_model_without_prompts(swin, size):
    bare = double(swin)
    torch.testing.assert_close(SwinByHand(bare).run(images(*size), {}), output_of(bare, images(*size)), **EXACT)


def test_deep_prompts_are_keys_and_values_of_every_window(swin):
    check_against_hand(swin, images(33, 50))


def test_shallow_prompts_go_through_windows_mlp_and_merging(swin):
    check_against_hand(swin, images(33, 50), {"deep": False}, deep=False)


@pytest.mark.parametrize("deep", [True, False])
def test_pooled_prompts_are_averaged_into_the_feature_beside_the_patches(swin, deep):
    check_against_hand(swin, images(33, 50), {"deep": deep, "pool": True}, deep=deep, pool_prompts=True)


@pytest.mark.parametrize("deep", [True, False])
def test_eager_attention_gives_the_same_windows(deep):
    eager, sdpa = (
        output_of(prompted(BACKBONES["swin"].build(attn_implementation=name), deep=deep), images(33, 50).float())
        for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_blocks_of_both_stages_get_prompts(swin):
    check_against_hand(swin, images(), layers_to_transform=[1, 2])


@pytest.mark.parametrize("deep", [True, False])
def test_a_window_of_the_whole_grid_is_not_shifted(swin, deep):
    # The second stage has 4 × 6 patches, one window high.
    settings = {"window_size": 4}
    check_against_hand(swin, images(), {"deep": deep}, settings, deep=deep)


@pytest.mark.parametrize("deep", [True, False])
def test_windows_larger_than_the_grid_are_cut_to_it(deep):
    # Swin-v2 alone: Transformers' Swin cuts the window and not its position bias, and fails by itself.
    settings = {"window_size": 7}
    check_against_hand(BACKBONES["swinv2"], images(), {"deep": deep}, settings, deep=deep)


def test_tokens_among_windows_are_refused_and_nothing_changes(swin):
    model = prompted(swin.build())
    before = output_of(model, images().float())
    with pytest.raises(ValueError, match="'tokens' for a Swin.*windows.*Leave it at 'keys_values'"):
        model.base_model.set_insertion("tokens")
    assert torch.equal(output_of(model, images().float()), before)


# Images of a batch


@pytest.mark.parametrize("deep", [True, False])
def test_each_image_of_a_batch_pools_the_prompts_of_its_own_adapter(swin, deep):
    model = prompted(double(swin), deep=deep, pool_prompts=True, modules_to_save=[])
    settings = {"init_weights": False, "modules_to_save": [], "deep": deep}
    model.add_adapter("five", VPTConfig(num_virtual_tokens=5, pool_prompts=True, **settings))
    model.add_adapter("unpooled", VPTConfig(num_virtual_tokens=4, **settings))
    model.add_adapter("other way", VPTConfig(num_virtual_tokens=2, **(settings | {"deep": not deep})))
    model.double().eval()
    names = ["five", "unpooled", "default", "__base__", "other way", "five"]
    pixel_values, bare = images(33, 50, count=len(names)), SwinByHand(double(swin))
    expected = []
    for image, name in zip(pixel_values, names):
        tables = {} if name == "__base__" else {i: p.table() for i, p in model.base_model.prompts(name).items()}
        goes_deep = not deep if name == "other way" else deep or name == "__base__"
        expected.append(bare.run(image[None], tables, goes_deep, pool=name in ("five", "default")))
    found = output_of(model, pixel_values, adapter_names=names)
    torch.testing.assert_close(found, torch.cat(expected), **EXACT)


def test_two_active_adapters_pool_their_own_prompts_alone(swin):
    model = prompted(double(swin), pool_prompts=True, modules_to_save=[])
    model.add_adapter("shallow", VPTConfig(num_virtual_tokens=2, deep=False, init_weights=False, modules_to_save=[]))
    model.double().base_model.set_adapter(["default", "shallow"])
    model.eval()
    both = output_of(model, images())
    model.base_model.set_adapter(["shallow", "default"])
    torch.testing.assert_close(output_of(model, images()), both, **EXACT)
    # By hand: a shallow prompt adds to every block's keys; only the last block's deep ones count in the mean.
    seen = []
    pooler = model.base_model.model.get_submodule(f"{swin.model_type}.pooler")
    pooler.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[2]))
    output_of(model, images())
    assert seen == [1], "patches and prompts are averaged before the pooler"


@pytest.mark.parametrize("name", ["vapt", "vpt_shallow"])
def test_an_images_logits_do_not_depend_on_its_batch_mates(swin, name):
    overrides = {"grid": "interpolate"} if name == "vapt" else {}
    model = get_peft_model(double(swin), ADAPTERS[name].config(3, swin, **overrides)).double().eval()
    pixel_values = images(33, 50, count=3)
    together = output_of(model, pixel_values)
    for order in ([2, 0, 1], [1, 1, 2]):
        torch.testing.assert_close(output_of(model, pixel_values[order]), together[order], **EXACT)
    torch.testing.assert_close(output_of(model, pixel_values[1:2]), together[1:2], **EXACT)


# VAPT


@pytest.mark.parametrize("size", IMAGES.values(), ids=IMAGES)
def test_vapt_makes_prompts_from_the_grid_of_each_stage(swin, size):
    grid = [-(-size[0] // 4), -(-size[1] // 4)]
    torch.manual_seed(2)
    config = VAPTConfig(num_virtual_tokens=3, grid=grid, init_weights=False)
    model = get_peft_model(double(swin), config).double().eval()
    made = model.base_model.prompts()
    halved = (-(-grid[0] // 2), -(-grid[1] // 2))
    assert [made[index].pooling.grid for index in (1, 2, 3)] == [tuple(grid), halved, halved]
    bare = double(swin)
    bare.classifier.load_state_dict(model.base_model.model.classifier.modules_to_save["default"].state_dict())
    expected = SwinByHand(bare).run(images(*size), made)
    torch.testing.assert_close(output_of(model, images(*size)), expected, **EXACT)


def test_vapt_shares_a_projector_among_blocks_of_one_width(swin):
    made = get_peft_model(swin.build(), VAPTConfig(num_virtual_tokens=3)).base_model.prompts()
    owners = [index for index in (1, 2, 3) if hasattr(made[index], "projector")]
    assert owners == [1, 2]
    assert [made[index].projector.down.in_features for index in owners] == [16, 32]


def test_a_kernel_larger_than_the_last_grid_is_refused(swin):
    model = swin.build()
    with pytest.raises(ValueError, match=r"kernel_size is 5. It must be at most 4 for a grid of \[8, 12\]"):
        get_peft_model(model, VAPTConfig(kernel_size=5))
    assert not any("hfvpt" in name for name, _ in model.named_parameters())


# PRO-VPT


def scores_of(model: nn.Module, seed: int) -> PromptScores:
    """Scores that let any prompt be the most idle one."""
    count = sum(len(p.serves) for p in model.base_model.prompts().values())
    return PromptScores(torch.rand(count, generator=torch.Generator().manual_seed(seed)).double(), loss=1.0)


@pytest.mark.parametrize("allocation", ["ppo", "thompson"])
def test_prompts_move_only_between_blocks_of_one_width(swin, allocation, tmp_path):
    config = PROVPTConfig(
        num_virtual_tokens=3, allocation=allocation, relocation_warmup=0, relocation_scale=0.5, init_weights=False
    )
    torch.manual_seed(0)
    model = get_peft_model(swin.build(), config).eval()
    moves = [model.base_model.relocate(scores_of(model, 0))]
    policy = model.base_model._relocators["default"].policy
    policy.epochs = 1  # it need not learn here
    moves += [model.base_model.relocate(scores_of(model, seed)) for seed in range(1, 40)]
    stage = [0, 0, 1, 1]
    assert all(stage[move.source] == stage[move.target] for move in moves)
    assert {stage[move.source] for move in moves if move.source != move.target} == {0, 1}
    distribution = model.base_model.distribution()
    assert [distribution[0] + distribution[1], distribution[2] + distribution[3]] == [6, 6]
    assert set(distribution.values()) != {3}, "nothing is elsewhere than at the start"
    expected = output_of(model, images().float())
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(swin.build(), tmp_path).eval()
    assert loaded.base_model.distribution() == distribution
    torch.testing.assert_close(output_of(loaded, images().float()), expected, rtol=0, atol=1e-6)
    again = get_peft_model(swin.build(), config).eval()
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    assert again.base_model.distribution() == distribution


def test_moved_prompts_act_in_their_new_block_as_written_by_hand(swin):
    model = (
        get_peft_model(double(swin), PROVPTConfig(num_virtual_tokens=3, init_weights=False, modules_to_save=[]))
        .double()
        .eval()
    )
    pool = model.base_model.prompts()
    for row in range(3):
        pool[0].move(row, 1, 1.0)  # block 0 is left without prompts
    pool[3].move(1, 2, 0.5)
    assert model.base_model.distribution() == {0: 0, 1: 6, 2: 4, 3: 2}
    tables = {index: prompts.table() for index, prompts in pool.items()}
    expected = SwinByHand(double(swin)).run(images(33, 50), tables)
    torch.testing.assert_close(output_of(model, images(33, 50)), expected, **EXACT)


def test_a_file_with_a_prompt_in_a_block_of_another_width_is_refused(swin, tmp_path):
    get_peft_model(swin.build(), PROVPTConfig(num_virtual_tokens=3)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if "layers.0.blocks.1" in key and key.endswith("block"))
    tensors[key][0] = 2
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    base = swin.build()
    with pytest.raises(ValueError, match=r"serve the blocks \[2\].*spans the blocks \[0, 1\] for prompts of width 16"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any("hfvpt" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("kind", ["gate", "attention"])
def test_scores_under_checkpointing_equal_those_without(swin, kind):
    found = []
    for checkpointing in (False, True):
        config = PROVPTConfig(num_virtual_tokens=3, prompt_dropout=0.0, score=kind, init_weights=False)
        torch.manual_seed(2)
        model = get_peft_model(double(swin), config).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batches = [{"pixel_values": images(count=count), "labels": torch.arange(count)} for count in (3, 2)]
        found.append(model.base_model.score_prompts(batches).values)
        # In a loop that trains on the batch as well, whose backward pass shows the prompts once more.
        with model.base_model.record_scores() as recorder:
            for batch in batches:
                loss = model(**batch).loss
                recorder.add(loss, len(batch["labels"]), retain_graph=True)
                loss.backward()
        found.append(recorder.result().values)
    assert found[0].abs().max() > 0
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], rtol=1e-8, atol=1e-14)


def test_gate_scores_without_a_norm_before_attention_are_the_gradient_to_a_factor():
    backbone = BACKBONES["swinv2"]
    config = PROVPTConfig(
        num_virtual_tokens=3, score_clip=None, prompt_dropout=0.0, init_weights=False, modules_to_save=[]
    )
    model = get_peft_model(double(backbone), config).double().eval()
    batch = {"pixel_values": images(), "labels": torch.tensor([1, 3])}
    tables = {index: prompts.table().detach() for index, prompts in model.base_model.prompts().items()}
    gates = {index: torch.ones(3, 1, dtype=torch.float64, requires_grad=True) for index in tables}
    logits = SwinByHand(double(backbone)).run(batch["pixel_values"], {i: gates[i] * tables[i] for i in tables})
    nn.functional.cross_entropy(logits, batch["labels"]).backward()
    expected = torch.cat([gate.grad[:, 0] for gate in gates.values()])
    torch.testing.assert_close(model.base_model.score_prompts([batch]).values, expected, rtol=1e-7, atol=1e-12)


# Checkpointing


@pytest.mark.parametrize("pool_prompts", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_checkpointing_keeps_the_gradients_of_prompts_beside_the_tokens(swin, deep, pool_prompts):
    gradients = []
    for checkpointing in (False, True):
        model = prompted(double(swin), deep=deep, pool_prompts=pool_prompts).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Two passes are alive at once.
        losses = [loss_of(output_of(model, images(*size))) for size in ((32, 48), (33, 50))]
        sum(losses).backward()
        gradients.append([p.prompt_embeddings.grad for p in model.base_model.prompts().values()])
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, **EXACT)


def test_stages_are_checkpointed_again_when_nothing_flows_beside_them(swin):
    def checkpointed():
        return [stage.gradient_checkpointing for stage in root.encoder.layers]

    model = prompted(swin.build(), deep=False).train()
    root = model.base_model.model.get_submodule(swin.model_type)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    output_of(model, images().float())
    assert checkpointed() == [False, False]
    model.add_adapter("deep", VPTConfig())
    model.delete_adapter("default")
    output_of(model, images().float())
    assert checkpointed() == [True, True]
    model.gradient_checkpointing_disable()
    output_of(model, images().float())
    assert checkpointed() == [False, False]


def test_unloading_lets_stages_be_checkpointed_again(swin):
    model = prompted(swin.build(), deep=False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    output_of(model, images().float())
    root = getattr(model.unload(), swin.model_type)
    assert all(stage.gradient_checkpointing for stage in root.encoder.layers)


# Files


@pytest.mark.parametrize("name", ["vpt_shallow", "vpt_projected", "vapt", "provpt"])
def test_an_adapter_of_a_classifier_loads_into_a_bare_backbone_and_back(swin, name, tmp_path):
    adapter = ADAPTERS[name]
    model = get_peft_model(swin.build(), adapter.config(3, swin, modules_to_save=[])).eval()
    model.save_pretrained(tmp_path / "classifier")
    bare_cls = {"swin": SwinModel, "swinv2": Swinv2Model}[swin.model_type]
    bare = bare_cls(swin.config()).eval()
    bare.load_state_dict(getattr(swin.build(), swin.model_type).state_dict())
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(bare, tmp_path / "classifier").eval()
    root = getattr(model.base_model.model, swin.model_type)
    pixel_values = images().float()
    torch.testing.assert_close(loaded(pixel_values).pooler_output, root(pixel_values).pooler_output, rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "bare")
    again = PeftModel.from_pretrained(swin.build(), tmp_path / "bare").eval()
    torch.testing.assert_close(output_of(again, pixel_values), output_of(model, pixel_values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("depths", [[1, 3], [2, 1, 1]], ids=str)
def test_an_adapter_for_other_depths_is_refused_with_both(swin, depths, tmp_path):
    prompted(swin.build()).save_pretrained(tmp_path)
    other = swin.build(depths=depths, num_heads=[2, 4, 8][: len(depths)])
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(other, tmp_path)
    assert f"depths={depths}" in str(error.value)
    assert "depths=[2, 2]" in str(error.value)
    assert not any("hfvpt" in name for name, _ in other.named_parameters())


def test_an_adapter_for_a_model_without_stages_is_refused(swin, tmp_path):
    prompted(BACKBONES["vit"].build(num_hidden_layers=4), modules_to_save=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"depths=\[2, 2\] and an adapter made for depths=None"):
        PeftModel.from_pretrained(swin.build(), tmp_path)


# BPT


def test_whitening_uses_each_blocks_own_inputs_and_projections(swin):
    config = BPTConfig(num_virtual_tokens=3, rank=4, basis="twhiten", modules_to_save=[])
    model = get_peft_model(swin.build(), config).eval()
    pixel_values = images(33, 50, count=3).float()
    initialize_whitening(model, [pixel_values])
    bare, inputs = swin.build(), []
    blocks = [block for stage in getattr(bare, swin.model_type).encoder.layers for block in stage.blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    output_of(bare, pixel_values)
    for index, prompts in model.base_model.prompts().items():
        attention = blocks[index].attention if swin.model_type == "swin" else blocks[index].attention.self
        names = ("q_proj", "k_proj") if swin.model_type == "swin" else ("query", "key")
        statistics = WhiteningStatistics(*(getattr(attention, name).weight.detach() for name in names))
        statistics.update(inputs[index])
        expected = whitening_matrix(statistics.covariance())[:, :4].float()
        assert prompts.factor_basis.shape == ((16, 16, 32, 32)[index], 4)
        torch.testing.assert_close(prompts.factor_basis.detach(), expected, rtol=1e-4, atol=1e-5)


# Copies


@torch.no_grad()  # PyTorch chooses another kernel where a position bias wants a gradient
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("deep", [True, False])
def test_a_copy_computes_the_same_and_goes_its_own_way(swin, deep, copy_of):
    model = prompted(swin.build(), deep=deep, pool_prompts=True)
    expected = output_of(model, images().float())
    copied = copy_of(model)
    assert torch.equal(output_of(copied, images().float()), expected)
    for prompts in copied.base_model.prompts().values():
        nn.init.zeros_(prompts.prompt_embeddings)
    assert torch.equal(output_of(model, images().float()), expected)
    assert not torch.equal(output_of(copied, images().float()), expected)
    bare = swin.build()
    assert torch.equal(output_of(copied.unload(), images().float()), output_of(bare, images().float()))


def test_unloading_gives_the_attention_its_own_class_and_config_back(swin):
    classes = [type(module) for module in swin.build().modules()]
    model = prompted(swin.build(), deep=False, pool_prompts=True).unload()
    assert [type(module) for module in model.modules()] == classes
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_checkpointing_that_is_on_before_the_model_is_wrapped_works(swin):
    # PEFT then lets what the embeddings return require gradients; in Swin that is a tuple, which cannot.
    base = swin.build()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gradients = []
    for model in (prompted(base).train(), prompted(swin.build()).train()):
        loss_of(output_of(model, images().float())).backward()
        gradients.append([p.prompt_embeddings.grad for p in model.base_model.prompts().values()])
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
