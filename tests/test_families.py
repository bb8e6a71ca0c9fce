"""Each family runs on its prompts as if they were tokens that its own modules had been given; what it cannot do, it
says."""

import copy
import pickle

import pytest
import torch
from by_hand import attend, concatenate_run_strip, leaves, prompted, tables_of
from conftest import ADAPTERS, BACKBONES, IMAGE_SIZE, PATCH_SIZE, output_of
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, ViTModel, ViTPreTrainedModel

from hf_vpt import BPTConfig, PROVPTConfig, VPTConfig, initialize_whitening
from hf_vpt.backbones import find_backbone
from hf_vpt.tuners.bpt import WhiteningStatistics, whitening_matrix


GLOBAL = [name for name, backbone in BACKBONES.items() if backbone.record.windows is None]
EXACT = {"rtol": 1e-8, "atol": 1e-11}


def double(backbone, **settings) -> nn.Module:
    # Transformers' eager attention takes its softmax in float32, whatever the model's dtype.
    return backbone.build(**{"attn_implementation": "sdpa", **settings}).double()


def is_untouched(model: nn.Module) -> bool:
    return not any("hfvpt" in name or "base_layer" in name for name, _ in model.named_modules())


# A family's own modules, from pixels to the input of block 0, through a block, and behind the last one


def embed_and_finish(root: nn.Module, model_type: str, inputs: dict):
    """What block 0 gets, and what is done behind the last block."""
    inputs = dict(inputs)
    pixel_values = inputs.pop("pixel_values")
    if model_type == "timm_wrapper":
        return root.norm_pre(root._pos_embed(root.patch_embed(pixel_values))), root.norm
    if "siglip2" in model_type:
        return root.embeddings(pixel_values, inputs["spatial_shapes"]), root.post_layernorm
    if "clip" in model_type and "siglip" not in model_type:
        return root.pre_layrnorm(root.embeddings(pixel_values, **inputs)), nn.Identity()
    if model_type == "vit_mae":
        return root.embeddings(pixel_values, **inputs)[0], root.layernorm
    norm = {"dinov3_vit": "norm"}.get(model_type, "post_layernorm" if "siglip" in model_type else "layernorm")
    return root.embeddings(pixel_values, **inputs), getattr(root, norm)


def run_beit(root: nn.Module, num_prompts: int):
    """BEiT's block with its attention written out: its position bias knows of no prompts, so theirs is zero."""

    def run(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        owner = block.relative_position_bias or root.shared_position_bias
        bias = owner((IMAGE_SIZE[0] // PATCH_SIZE, IMAGE_SIZE[1] // PATCH_SIZE))
        for dim in (2, 3):  # rows, then columns, behind those of CLS
            cls, patches = bias.split([1, bias.shape[dim] - 1], dim)
            bias = torch.cat([cls, torch.zeros_like(cls).repeat_interleave(num_prompts, dim), patches], dim)
        attention, normed = block.attention, block.layernorm_before(tokens)
        mixed = attend(*(p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)), 2, bias)
        tokens = tokens + block.lambda_1 * attention.o_proj(mixed)
        return tokens + block.lambda_2 * block.mlp(block.layernorm_after(tokens))

    return run


def runner(root: nn.Module, backbone, inputs: dict, num_prompts: int):
    """Runs a bare block on tokens and prompts, whose rows and columns the family's own arguments are told of."""
    if backbone.model_type == "beit":
        return run_beit(root, num_prompts)
    if backbone.model_type == "dinov3_vit":
        # What stands before the patches is not rotated.
        positions = root.rope_embeddings(inputs["pixel_values"])
        return lambda block, tokens: block(tokens, position_embeddings=positions)
    if "pixel_attention_mask" in inputs:
        hidden = (1 - inputs["pixel_attention_mask"])[:, None, None].double() * torch.finfo(torch.float64).min
        mask = nn.functional.pad(hidden, (num_prompts, 0))
        return lambda block, tokens: block(tokens, mask)
    if "clip" in backbone.model_type or "siglip" in backbone.model_type:
        return lambda block, tokens: block(tokens, None)
    return lambda block, tokens: block(tokens)


def last_hidden_state(model: nn.Module, inputs: dict) -> torch.Tensor:
    root = model.get_submodule(find_backbone(model).root)
    if hasattr(root, "forward_features"):
        return root.forward_features(inputs["pixel_values"])
    return root(**inputs).last_hidden_state


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", GLOBAL)
def test_prompts_act_as_tokens_given_to_the_familys_own_modules(name, deep, pixel_values):
    backbone = BACKBONES[name]
    inputs = backbone.inputs(pixel_values[:2].double())
    model, bare = prompted(double(backbone), deep=deep).double(), double(backbone)
    tables = leaves(tables_of(model))
    root = bare.get_submodule(find_backbone(bare).root)
    hidden, finish = embed_and_finish(root, backbone.model_type, inputs)
    run = runner(root, backbone, inputs, num_prompts=3)
    expected = finish(concatenate_run_strip(bare, hidden, tables, deep, run))
    found = last_hidden_state(model.base_model.model, inputs)
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found - last_hidden_state(bare, inputs)).abs().max() > 1e-3, "the prompts changed nothing"
    weights = torch.arange(found.numel(), dtype=found.dtype).view_as(found).cos()
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for index, prompts in model.base_model.prompts().items():
        torch.testing.assert_close(prompts.prompt_embeddings.grad, tables[index].grad, **EXACT, msg=f"block {index}")


def test_padded_patches_do_not_reach_prompts_and_each_image_has_its_own(pixel_values):
    # SigLIP 2: images of 6 and of 4 patches, padded to 8. What stands in the padding makes no difference.
    backbone = BACKBONES["siglip2"]
    inputs = backbone.inputs(pixel_values[:2].double())
    inputs["pixel_attention_mask"] = torch.tensor([[1] * 6 + [0] * 2, [1] * 4 + [0] * 4])
    inputs["spatial_shapes"] = torch.tensor([[2, 3], [2, 2]])
    for deep in (True, False):
        model = prompted(double(backbone), deep=deep).double()
        expected = model(**inputs).logits
        changed = inputs | {"pixel_values": inputs["pixel_values"].clone()}
        changed["pixel_values"][0, 6:] += 1.0
        changed["pixel_values"][1, 4:] += 1.0
        torch.testing.assert_close(model(**changed).logits, expected, **EXACT)
        # Alone and without padding, the second image is what it is beside the first one.
        alone = {name: value[1:, :4] if value.shape[1] > 2 else value[1:] for name, value in inputs.items()}
        torch.testing.assert_close(model(**alone).logits, expected[1:], **EXACT)


# Shapes of images


@pytest.mark.parametrize("patch_size", [8, 14, 16, 32])
@pytest.mark.parametrize("name", ["vit", "deit", "vit_msn", "ijepa", "dinov2", "clip", "siglip", "beit"])
def test_patches_and_images_of_other_sizes_and_shapes_work(name, patch_size):
    backbone = BACKBONES[name]
    model = prompted(double(backbone, image_size=3 * patch_size, patch_size=patch_size)).double()
    bare = double(backbone, image_size=3 * patch_size, patch_size=patch_size)
    for rows, columns in ((3, 3), (2, 5)):
        pixel_values = torch.randn(2, 3, rows * patch_size, columns * patch_size, dtype=torch.float64)
        inputs = {"pixel_values": pixel_values} | backbone.interpolates
        found = last_hidden_state(model.base_model.model, inputs)
        assert found.shape == (2, backbone.num_prefix_tokens + rows * columns, 16)
        if name == "beit":  # which does not run on more tokens; see above
            continue
        embed = {"interpolate_pos_encoding": True} if backbone.interpolates else {}
        root = bare.get_submodule(find_backbone(bare).root)
        hidden, finish = embed_and_finish(root, name, {"pixel_values": pixel_values} | embed)
        run = runner(root, backbone, inputs, num_prompts=3)
        expected = finish(concatenate_run_strip(bare, hidden, tables_of(model), run=run))
        torch.testing.assert_close(found, expected, **EXACT)


# What is refused


REFUSED = [(name, asked) for name, backbone in BACKBONES.items() for asked in backbone.record.refused]


@pytest.mark.parametrize(("name", "asked"), REFUSED)
def test_what_a_record_refuses_is_an_error_that_says_why(name, asked):
    backbone = BACKBONES[name]
    adapters = [adapter for adapter in ADAPTERS.values() if adapter.is_refused(backbone)]
    assert adapters
    for adapter in adapters:
        model = backbone.build()
        with pytest.raises(ValueError) as error:
            get_peft_model(model, adapter.config())
        assert backbone.record.refused[asked] in str(error.value)
        assert f"{asked!r} with {backbone.record.title}" in str(error.value)
        assert is_untouched(model)


@pytest.mark.parametrize("name", GLOBAL)
def test_prompts_are_not_pooled_where_no_module_averages_the_tokens(name):
    model = BACKBONES[name].build()
    with pytest.raises(ValueError, match="VPTConfig.pool_prompts is True. It must be False"):
        get_peft_model(model, VPTConfig(pool_prompts=True))
    assert is_untouched(model)


def test_prompts_are_not_pooled_without_some_in_the_last_block():
    model = BACKBONES["swin"].build()
    with pytest.raises(ValueError, match="unless the last block has prompts"):
        get_peft_model(model, VPTConfig(pool_prompts=True, layers_to_transform=[0, 1]))
    assert is_untouched(model)


def timm_model(architecture: str, **model_args) -> nn.Module:
    model_args = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": (28, 42)} | model_args
    config = TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=model_args)
    return TimmWrapperForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        ("eva02_tiny_patch14_224", "timm.models.eva.EvaBlock"),
        ("eva02_base_patch14_224", "timm.models.eva.EvaBlock"),
        ("vit_small_patch14_reg4_dinov2", None),
        ("vit_small_patch16_rope_224", "timm.models.eva.EvaBlock"),
        ("beit_base_patch16_224", "timm.models.beit.Block"),
        # Its attention is timm's plain one, but its norms stand behind it: prompts went in normalised.
        ("vit_base_patch16_rpn_224", "timm.models.vision_transformer.ResPostBlock"),
        ("vit_small_patch16_18x2_224", "timm.models.vision_transformer.ParallelThingsBlock"),
    ],
)
def test_a_timm_model_that_is_no_plain_vit_is_refused_and_stays_as_it_was(architecture, found):
    model = timm_model(architecture)
    if found is None:
        assert not is_untouched(get_peft_model(model, VPTConfig()))
        return
    with pytest.raises(ValueError, match=f"Found {found} in a timm model. Prompts need its plain vision transformers"):
        get_peft_model(model, VPTConfig())
    assert is_untouched(model)


def test_a_timm_model_without_blocks_is_refused():
    config = TimmWrapperConfig(architecture="resnet18", num_labels=5, model_args={"channels": (8, 8, 8, 8)})
    with pytest.raises(ValueError, match="Found 0 vision transformers"):
        get_peft_model(TimmWrapperForImageClassification(config), VPTConfig())


# Heads


class MyViTForImageClassification(ViTPreTrainedModel):
    """A class of a user's own, whose head has a name of its own."""

    def __init__(self, config, head="fc"):
        super().__init__(config)
        self.vit, self.head_name = ViTModel(config, add_pooling_layer=False), head
        setattr(self, head, nn.Linear(config.hidden_size, config.num_labels))
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = getattr(self, self.head_name)(self.vit(pixel_values).last_hidden_state[:, 0])
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_head_of_any_name_is_found_trained_and_saved(pixel_values, tmp_path):
    torch.manual_seed(0)
    base = MyViTForImageClassification(BACKBONES["vit"].config())
    fresh = copy.deepcopy(base)
    model = prompted(base).train()
    assert model.peft_config["default"].modules_to_save == ["fc"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(pixel_values=pixel_values, labels=torch.arange(4))["loss"].backward()
    optimizer.step()
    assert not torch.equal(model.base_model.model.fc.modules_to_save["default"].weight, fresh.fc.weight)
    assert {name for name, p in model.named_parameters() if p.grad is not None and "hfvpt" not in name} == {
        f"base_model.model.fc.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    expected = model.eval()(pixel_values)["logits"]
    torch.testing.assert_close(loaded(pixel_values)["logits"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", ["proj", "fc2", "norm"])
def test_a_head_whose_name_ends_like_modules_of_the_backbone_is_refused(head):
    # PEFT goes by how names end, so it trained the projections of every block beside a head called `proj`.
    model = MyViTForImageClassification(BACKBONES["vit"].config(), head)
    with pytest.raises(ValueError, match=f"Found a head called '{head}' and modules of the backbone"):
        get_peft_model(model, VPTConfig())
    assert is_untouched(model)
    model = get_peft_model(model, VPTConfig(modules_to_save=[]))
    assert all("hfvpt" in name for name, p in model.named_parameters() if p.requires_grad)


# What holds beside the wrapped model


@pytest.mark.parametrize("name", BACKBONES)
def test_nothing_is_random_but_prompts_in_a_model_without_a_tuner(name, pixel_values):
    # DINOv3 rescales its positions at random while training, beside the embeddings.
    config = VPTConfig(num_virtual_tokens=2, init_weights=False)
    model = inject_adapter_in_model(config, BACKBONES[name].build()).train()
    assert torch.equal(output_of(model, pixel_values), output_of(model, pixel_values))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_wrapped_timm_model_goes_its_own_way(copy_of, pixel_values):
    model = prompted(BACKBONES["timm"].build())
    expected = output_of(model, pixel_values)
    copied = copy_of(model)
    assert torch.equal(output_of(copied, pixel_values), expected)
    for prompts in copied.base_model.prompts().values():
        nn.init.zeros_(prompts.prompt_embeddings)
    assert torch.equal(output_of(model, pixel_values), expected)
    assert not torch.equal(output_of(copied, pixel_values), expected)
    bare = BACKBONES["timm"].build()
    assert torch.equal(output_of(copied.unload(), pixel_values), output_of(bare, pixel_values))


@pytest.mark.parametrize("name", BACKBONES)
def test_unloading_gives_every_module_its_own_class_and_no_hook(name):
    bare = BACKBONES[name].build()
    model = prompted(BACKBONES[name].build(), deep=False).unload()
    assert [type(module) for module in model.modules()] == [type(module) for module in bare.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())


# Whitening


@pytest.mark.parametrize("name", GLOBAL)
def test_whitening_runs_on_inputs_as_the_family_takes_them(name, pixel_values):
    # It used to pass the pixels alone, which SigLIP 2 cannot do with, nor any model that is to interpolate positions.
    backbone = BACKBONES[name]
    settings = {"rank": 4, "basis": "twhiten", "modules_to_save": []}
    model = get_peft_model(backbone.build(), BPTConfig(num_virtual_tokens=3, **settings)).eval()
    initialize_whitening(model, [backbone.inputs(pixel_values) | {"labels": torch.arange(4)}], num_images=3)
    bare, inputs = backbone.build(), []
    layout = find_backbone(bare)
    blocks = [bare.get_submodule(block) for block in layout.block_names]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    output_of(bare, pixel_values[:3])
    for index, prompts in model.base_model.prompts().items():
        attention = blocks[index].get_submodule(layout.record.attention)
        if name == "timm":
            query, key = attention.qkv.weight[:16], attention.qkv.weight[16:32]
        else:
            query, key = attention.q_proj.weight, attention.k_proj.weight
        statistics = WhiteningStatistics(query.detach(), key.detach())
        statistics.update(inputs[index])
        expected = whitening_matrix(statistics.covariance())[:, :4].float()
        torch.testing.assert_close(prompts.factor_basis.detach(), expected, rtol=1e-3, atol=1e-5)


# PRO-VPT


def test_scores_of_a_timm_model_under_checkpointing_equal_those_without(pixel_values):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        config = PROVPTConfig(num_virtual_tokens=3, prompt_dropout=0.0, score="attention", init_weights=False)
        model = get_peft_model(BACKBONES["timm"].build().double(), config).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = {"pixel_values": pixel_values.double(), "labels": torch.arange(4)}
        with model.base_model.record_scores() as recorder:
            for _ in range(2):
                loss = model(**batch).loss
                recorder.add(loss, 4, retain_graph=True)
                loss.backward()
        found.append(recorder.result().values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-14)
