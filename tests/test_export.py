"""Files for deployment compute what the model computes, know their classes, and appear only when they are right."""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, IMAGE_SIZE
from peft import get_peft_model
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessorPil

from hf_vpt import PROVPTConfig, VPTConfig
from hf_vpt.export import export_onnx, export_program, formats, recording
from hf_vpt.export.description import describe


onnxruntime = pytest.importorskip("onnxruntime")

NAMES = ["cat", "dog", "Käfer", "bird", "fish"]
# What a reader of the README types: no PyTorch, the file alone.
PREDICT = """
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("classifier.onnx")
about = session.get_modelmeta().custom_metadata_map
names, steps = json.loads(about["class_names"]), json.loads(about["preprocessing"])
image, size = Image.open("photo.png").convert("RGB"), steps["size"]
if "shortest_edge" in size:
    scale = size["shortest_edge"] / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], steps["resample"])
else:
    image = image.resize((size["width"], size["height"]), steps["resample"])
if crop := steps.get("crop_size"):
    left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
    image = image.crop((left, top, left + crop["width"], top + crop["height"]))
pixels = np.float32(image) * steps["rescale_factor"]
pixels = (pixels - steps["image_mean"]) / steps["image_std"]
(logits,) = session.run(None, {"pixel_values": np.float32(pixels.transpose(2, 0, 1)[None])})
print(names[logits.argmax()])
"""


def wrap(backbone="vit", adapter="vpt_deep", **overrides):
    """A classifier with prompts that are not neutral, even smaller than elsewhere: recording takes its time."""
    tiny = BACKBONES[backbone]
    if "num_hidden_layers" in tiny.settings:
        overrides["num_hidden_layers"] = 1 if ADAPTERS[adapter].method != "vapt" else 2  # its first block is another
    model = get_peft_model(tiny.build(**overrides), ADAPTERS[adapter].config(3, tiny))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mix.weight"):
                # Else VAPT's prompts spread little around their mean, and the norm of onnxruntime < 1.30 loses digits.
                parameter.mul_(100)
    return model


def images(number, size=IMAGE_SIZE):
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(number))


def logits_of(model, pixel_values, **options):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(pixel_values, **options).logits


def run_onnx(path, pixel_values):
    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


def assert_same_function(path, model, size=IMAGE_SIZE, **options):
    """On images and numbers of images that the export has not seen."""
    for number in (1, 3, 5):
        found, expected = run_onnx(path, images(number, size)), logits_of(model, images(number, size), **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


# PRO-VPT has a test of its own; what vpt_projected and bpt_fixed become when they are baked, others become too.
@pytest.mark.parametrize("adapter", ["vpt_deep", "vpt_shallow", "vapt", "bpt_deep", "bpt_shallow"])
def test_every_method_is_exported_to_onnx(adapter, tmp_path):
    model = wrap(adapter=adapter)
    path = export_onnx(model, tmp_path / "model.onnx", images(2))
    assert_same_function(path, model)
    assert list(tmp_path.iterdir()) == [path]
    assert_no_paths(path)


def assert_no_paths(path):
    """The exporter writes down where each line of Python code lies, user names and all."""
    content = path.read_bytes()
    for module in (torch, recording):
        assert str(Path(module.__file__).parent).encode() not in content


@pytest.mark.parametrize(
    ("backbone", "adapter", "size", "options"),
    [
        ("beit", "vpt_deep", IMAGE_SIZE, {}),
        ("dinov2", "bpt_deep", IMAGE_SIZE, {}),  # made for squares: positions are interpolated
        ("clip", "vpt_deep", (32, 64), {"interpolate_pos_encoding": True}),
        ("siglip", "vpt_shallow", (48, 48), {}),
    ],
)
def test_other_backbones_and_image_sizes_are_exported_to_onnx(backbone, adapter, size, options, tmp_path):
    model = wrap(backbone, adapter)
    path = export_onnx(model, tmp_path / "model.onnx", images(2, size), **options)
    assert_same_function(path, model, size, **options)


def test_a_model_of_timm_is_exported_to_onnx(tmp_path):
    model = wrap("timm", model_args=BACKBONES["timm"].overrides["model_args"] | {"depth": 1})
    assert_same_function(export_onnx(model, tmp_path / "model.onnx", images(2)), model)


@pytest.mark.parametrize(("backbone", "depth"), [("swin", 2), ("swinv2", 1)])
def test_windows_are_exported_to_onnx(backbone, depth, tmp_path):
    model = wrap(backbone, depths=[depth], num_heads=[2])
    assert_same_function(export_onnx(model, tmp_path / "model.onnx", images(2), verify=False), model)


def test_prompts_are_exported_where_they_have_moved_to(tmp_path):
    base = BACKBONES["vit"].build(num_hidden_layers=2)
    model = get_peft_model(base, PROVPTConfig(num_virtual_tokens=2, init_weights=False))
    before = logits_of(model, images(3))
    for row in range(2):
        model.base_model.pool()[0].move(row, 1, scale=1.0)
    assert model.base_model.distribution()[0] == 0
    assert not torch.allclose(logits_of(model, images(3)), before)
    assert_same_function(export_onnx(model, tmp_path / "model.onnx", images(2)), model)


@pytest.mark.parametrize("adapter", ["provpt", "vapt"])
def test_a_program_of_torch_runs_any_number_of_images_and_knows_its_classes(adapter, tmp_path):
    model = wrap(adapter=adapter, id2label=dict(enumerate(NAMES)))
    path = export_program(model, tmp_path / "model.pt2", images(1))
    about = {"class_names": ""}
    program = torch.export.load(path, extra_files=about).module()
    for number in (1, 3, 5):
        expected = logits_of(model, images(number))
        torch.testing.assert_close(program(images(number)), expected, rtol=0, atol=1e-5)
    assert json.loads(about["class_names"]) == NAMES
    assert list(tmp_path.iterdir()) == [path]
    assert_no_paths(path)


SQUEEZE = {"size": {"height": 32, "width": 48}}
CUT_OUT = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 48}}


@pytest.mark.parametrize("shape", [SQUEEZE, CUT_OUT])
def test_the_file_is_enough_for_onnxruntime_alone(shape, tmp_path):
    processor = ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], **shape)
    model = wrap(id2label=dict(enumerate(NAMES)))
    export_onnx(model, tmp_path / "classifier.onnx", images(2), processor=processor)
    photo = Image.effect_noise((90, 70), 200).convert("RGB")
    photo.save(tmp_path / "photo.png")
    check = "assert not {'torch', 'transformers', 'peft', 'hf_vpt'} & set(sys.modules)\nprint(logits.tolist())\n"
    command = [sys.executable, "-c", PREDICT + check]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120).stdout
    name, logits = printed.splitlines()
    expected = logits_of(model, processor(photo, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=0, atol=1e-4)
    assert name == NAMES[expected.argmax()]


def test_steps_that_a_processor_leaves_out_are_written_down_as_neutral_ones():
    processor = ViTImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
    steps = describe(BACKBONES["vit"].build(), images(1), processor)["preprocessing"]
    assert steps == {"rescale_factor": 1.0, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def test_a_processor_of_timm_is_described_in_the_same_words(tmp_path):
    transformers = pytest.importorskip("transformers.models.timm_wrapper.image_processing_timm_wrapper")
    cfg = {"input_size": [3, 48, 48], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.2] * 3}
    processor = transformers.TimmWrapperImageProcessor({**cfg, "crop_mode": "center"})
    model = wrap("dinov2")
    steps = describe(model, images(1, (48, 48)), processor)["preprocessing"]
    assert steps["size"] == {"shortest_edge": 53}
    photo = Image.effect_noise((90, 70), 200).convert("RGB")
    same = ViTImageProcessorPil(do_center_crop=True, **steps)
    expected = processor(photo)["pixel_values"]
    torch.testing.assert_close(same(photo, return_tensors="pt")["pixel_values"], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="crop_mode='squash'.*Leave `processor` out"):
        describe(model, images(1, (48, 48)), transformers.TimmWrapperImageProcessor({**cfg, "crop_mode": "squash"}))


def test_the_script_exports_an_adapter_with_classes_of_its_own(tmp_path, monkeypatch, capsys):
    BACKBONES["vit"].build(num_hidden_layers=1).save_pretrained(tmp_path / "backbone")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48})
    processor.save_pretrained(tmp_path / "backbone")
    base = ViTForImageClassification.from_pretrained(tmp_path / "backbone")
    config = VPTConfig(num_virtual_tokens=2, init_weights=False, label_names=["ape", "bee", "cat"])
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "new" / "classifier.pt2"
    script = Path(__file__).parents[1] / "scripts" / "export.py"
    command = [str(script), str(tmp_path / "adapter"), "--output", str(output), "--format", "torch"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.endswith("MB, for 32 × 48 pixels and 3 classes.\n")
    about = {"class_names": "", "preprocessing": ""}
    program = torch.export.load(output, extra_files=about).module()
    torch.testing.assert_close(program(images(3)), logits_of(model, images(3)), rtol=0, atol=1e-5)
    assert json.loads(about["class_names"]) == ["ape", "bee", "cat"]
    assert json.loads(about["preprocessing"])["image_mean"] == [0.5] * 3


def train_a_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(0)
    loss = model(pixel_values=images(4), labels=torch.arange(4)).loss
    loss.backward()
    optimizer.step()
    model.zero_grad()
    return loss.item()


@pytest.mark.parametrize("adapter", ["vpt_deep", "vapt"])
def test_exporting_in_the_middle_of_training_changes_nothing(adapter, tmp_path):
    model = wrap(adapter=adapter).train()
    train_a_step(model)
    twin = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    export_program(model, tmp_path / "model.pt2", images(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [module.training for module in twin.modules()]
    assert train_a_step(model) == train_a_step(twin)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(found, expected), name
        assert found.requires_grad == expected.requires_grad, name
    assert model.config._attn_implementation == "sdpa"


def program_of(model, path):
    return torch.export.load(export_program(model, path, images(2))).module()


def test_plain_and_baked_models_and_disabled_adapters_are_exported_as_they_are(tmp_path):
    model = wrap()
    prompted = logits_of(model, images(3))
    with model.disable_adapter():
        bare = logits_of(model, images(3))
        torch.testing.assert_close(program_of(model, tmp_path / "bare.pt2")(images(3)), bare, rtol=0, atol=1e-5)
    assert not torch.allclose(prompted, bare, atol=1e-3)
    baked = model.bake()
    torch.testing.assert_close(program_of(baked, tmp_path / "baked.pt2")(images(3)), prompted, rtol=0, atol=1e-5)
    plain = BACKBONES["vit"].build(num_hidden_layers=1)
    torch.testing.assert_close(program_of(plain, tmp_path / "plain.pt2")(images(3)), logits_of(plain, images(3)))


def test_a_model_in_bfloat16_becomes_a_file_in_float32(tmp_path):
    model = wrap().to(torch.bfloat16)
    found = program_of(model, tmp_path / "model.pt2")(images(3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits_of(model.float(), images(3)), rtol=0, atol=1e-5)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_a_file_that_computes_something_else_is_not_written(export, tmp_path, monkeypatch):
    # With a mask in the graph, BEiT adds one to the logits of attention to tokens, but not to prompts.
    monkeypatch.setattr(recording, "UNMASKED_ATTENTION", "sdpa")
    path = tmp_path / "model.onnx"
    path.write_text("an older file")
    with pytest.raises(RuntimeError, match=r"differ by up to 0\.\d+ from the model's.*0\.0001 is allowed.*tolerance"):
        export(wrap("beit"), path, images(2))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older file"]


@pytest.mark.parametrize("allowed", [{"tolerance": 1.0}, {"verify": False}])
def test_a_file_that_computes_something_else_is_written_where_that_is_allowed(allowed, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "UNMASKED_ATTENTION", "sdpa")
    export_program(wrap("beit"), tmp_path / "model.pt2", images(2), **allowed)
    assert (tmp_path / "model.pt2").stat().st_size > 1000


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'^Found no {package}\. .* needs .*pip install "hf_vpt\[onnx\]"'):
        export_onnx(wrap(), tmp_path / "model.onnx", images(2))


@pytest.mark.parametrize(
    ("backbone", "found"),
    [("siglip2", "takes patches.*such as SigLIP"), ("clip_vision_model", "no classes.*AutoModelForImageClassif")],
)
def test_a_model_that_is_no_classifier_of_images_is_refused(backbone, found, tmp_path):
    model = get_peft_model(BACKBONES[backbone].build(), VPTConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match=found):
        export_program(model, tmp_path / "model.pt2", images(2))


def test_a_quantised_model_is_refused(tmp_path):
    model = wrap()
    model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="quantised ViTForImageClassification.*without quantization"):
        export_program(model, tmp_path / "model.pt2", images(2))


def test_a_model_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_ONNX", 1000)
    with pytest.raises(ValueError, match="Found a model of 0.0 GB.*Use `export_program`"):
        export_onnx(wrap(), tmp_path / "model.onnx", images(2))


def test_an_example_of_another_size_than_the_processors_is_refused(tmp_path):
    processor = ViTImageProcessorPil(size={"height": 48, "width": 32})
    with pytest.raises(ValueError, match="example of 32 × 48 pixels and a processor that makes 48 × 32"):
        export_program(wrap(), tmp_path / "model.pt2", images(2), processor=processor)
