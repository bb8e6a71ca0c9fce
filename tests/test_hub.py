"""Adapters go to the Hub from one process and come back in another: the real client, a server of our own."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ADAPTERS, BACKBONES, IMAGE_SIZE, output_of
from huggingface_hub import HfApi, ModelCard, hf_hub_download, try_to_load_from_cache
from peft import AutoPeftModel, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load
from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

from hf_vpt import load_image_classifier
from hf_vpt.classifiers import load_backbone, load_classifier_config
from hf_vpt.hub import loading
from hf_vpt.training import parse_arguments, train_classifier


BASE = "user/base"
NAMES = ["ape", "bee", "cat"]
# One adapter of each method and form.
REPOSITORIES = {name: f"user/{name.replace('_', '-')}" for name in ADAPTERS}


# Functions that run in the process of a client.


def images() -> torch.Tensor:
    return torch.randn(4, 3, *IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def say(model: torch.nn.Module) -> torch.Tensor:
    return output_of(model, images()).detach()


def push_base() -> None:
    BACKBONES["vit"].build(num_labels=2).push_to_hub(BASE)
    ViTImageProcessor(size={"height": IMAGE_SIZE[0], "width": IMAGE_SIZE[1]}).push_to_hub(BASE)


def make(names: dict[str, list[str]], adapter: str = "vpt_deep", seed: int = 0) -> PeftModel:
    """A model with adapters of one method that are not trivial, by name, each with classes of its own."""
    torch.manual_seed(seed)
    model = load_backbone(BASE, load_classifier_config(BASE, None))
    for name, labels in names.items():
        config = ADAPTERS[adapter].config(2, label_names=labels)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for parameter in model.get_submodule("base_model.model.classifier").modules_to_save.parameters():
            parameter.normal_()
    return model.eval()


def push(repository: str, adapter: str = "vpt_deep", seed: int = 0, **options) -> tuple[str, torch.Tensor]:
    """Pushes an adapter; returns the commit and what the model says of the images."""
    model = make({"default": NAMES}, adapter, seed)
    commit = model.push_to_hub(repository, **options)
    return commit.oid, say(model)


def push_two(repository: str, names: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    model = make(names)
    model.push_to_hub(repository)
    outputs = {}
    for name in names:
        model.set_adapter(name)
        outputs[name] = say(model)
    return outputs


def use(repository: str, **options) -> tuple[list[str], torch.Tensor, dict]:
    model, processor = load_image_classifier(repository, **options)
    return list(model.config.id2label.values()), say(model), processor.to_dict()["size"]


def use_many(repositories: list[str], names: list[str]) -> torch.Tensor:
    """Probabilities of a batch whose images name their adapters."""
    model, _ = load_image_classifier(repositories[0], adapter_name=repositories[0])
    for repository in repositories[1:]:
        load_image_classifier(repository, into=model, adapter_name=repository)
    with torch.no_grad():
        return model(pixel_values=images(), adapter_names=names).logits.softmax(dim=-1)


def use_with_peft(repository: str) -> tuple[torch.Tensor, torch.Tensor]:
    base = AutoModelForImageClassification.from_pretrained(BASE)
    own = PeftModel.from_pretrained(base, repository).eval()
    return say(own), say(AutoPeftModel.from_pretrained(repository).eval())


def classify(repository: str) -> list[dict]:
    """What a pipeline says that is given a name alone."""
    return pipeline("image-classification", model=repository, top_k=3)(Image.new("RGB", (48, 32), "red"))


def classify_by_hand(repository: str) -> list[dict]:
    model, processor = load_image_classifier(repository)
    return pipeline("image-classification", model=model, image_processor=processor, top_k=3)(
        Image.new("RGB", (48, 32), "red")
    )


def error(function, *arguments, **options) -> str | None:
    try:
        function(*arguments, **options)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return None


def use_bounded(repository: str, max_bytes: int) -> None:
    loading.MAX_WEIGHTS_BYTES, before = max_bytes, loading.MAX_WEIGHTS_BYTES
    try:
        load_image_classifier(repository)
    finally:
        loading.MAX_WEIGHTS_BYTES = before


def rebase(repository: str, base: str) -> None:
    """Changes the base model that an adapter on the Hub names."""
    file = hf_hub_download(repository, "adapter_config.json")
    config = json.loads(Path(file).read_text()) | {"base_model_name_or_path": base}
    HfApi().upload_file(
        path_or_fileobj=json.dumps(config).encode(), path_in_repo="adapter_config.json", repo_id=repository
    )


def replace_by_pickle(repository: str) -> None:
    HfApi().upload_file(path_or_fileobj=b"pickle", path_in_repo="adapter_model.bin", repo_id=repository)
    HfApi().delete_file("adapter_model.safetensors", repository)


def use_offline(repository: str) -> tuple[list[str], torch.Tensor, dict]:
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        return use(repository)


def is_cached(repository: str, name: str) -> bool:
    return isinstance(try_to_load_from_cache(repository, name), str)


def train_and_push(folder: str, repository: str, *options: str) -> dict:
    settings = [f"--model_name_or_path={BASE}", f"--dataset_name={folder}", f"--output_dir={folder}/out"]
    settings += ["--num_train_epochs=2", "--per_device_train_batch_size=4", "--learning_rate=0.1", "--use_cpu"]
    settings += ["--push_to_hub", f"--hub_model_id={repository}", "--hub_license=mit", *options]
    return train_classifier(parse_arguments(settings))


@pytest.fixture(scope="module")
def sender(hub, tmp_path_factory):
    with hub.client(tmp_path_factory.mktemp("sender"), "hf_user") as client:
        client(push_base)
        yield client


@pytest.fixture(scope="module")
def receiver(hub, sender, tmp_path_factory):
    """Somebody who has not logged in."""
    with hub.client(tmp_path_factory.mktemp("receiver")) as client:
        yield client


@pytest.fixture(scope="module")
def pushed(sender):
    return {name: sender(push, repository, name)[1] for name, repository in REPOSITORIES.items()}


def test_an_adapter_comes_back_with_its_head_its_names_and_a_processor(adapter, hub, pushed, receiver):
    (key,) = (name for name, other in ADAPTERS.items() if other is adapter)
    names, output, size = receiver(use, REPOSITORIES[key])
    assert names == NAMES and size == {"height": IMAGE_SIZE[0], "width": IMAGE_SIZE[1]}
    assert torch.equal(output, pushed[key])
    head = hub.repositories[REPOSITORIES[key]].find("main")
    assert set(head.files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_pefts_own_loaders_give_the_same(adapter, pushed, receiver):
    (key,) = (name for name, other in ADAPTERS.items() if other is adapter)
    for output in receiver(use_with_peft, REPOSITORIES[key]):
        torch.testing.assert_close(output, pushed[key])


def test_a_pipeline_that_is_given_a_name_uses_the_adapter(pushed, receiver):
    found = receiver(classify, REPOSITORIES["vapt"])
    assert found == receiver(classify_by_hand, REPOSITORIES["vapt"])
    assert {entry["label"] for entry in found} == set(NAMES)


@pytest.mark.parametrize("names", [("default", "second"), ("first", "second")])
def test_several_adapters_share_a_repository_and_a_model(names, sender, receiver):
    labels = dict(zip(names, (NAMES, ["x", "y", "z", "w"]), strict=True))
    repository = f"user/two-{names[0]}"
    outputs = sender(push_two, repository, labels)
    for name, output in outputs.items():
        found, logits, _ = receiver(use, repository, subfolder=None if name == "default" else name)
        assert found == labels[name]
        assert torch.equal(logits, output)


def test_images_of_one_batch_name_their_adapters_from_several_repositories(sender, receiver):
    repositories, outputs = ["user/mixed-0", "user/mixed-1"], []
    for seed, repository in enumerate(repositories):
        outputs.append(sender(push, repository, seed=seed + 1)[1])
    rows = [0, 1, 1, 0]
    mixed = receiver(use_many, repositories, [repositories[row] for row in rows])
    for position, row in enumerate(rows):
        torch.testing.assert_close(mixed[position], outputs[row][position].softmax(dim=-1))


def test_a_revision_is_that_of_the_adapter_and_the_base_model_is_the_one_it_was_made_on(hub, sender, receiver):
    first, old = sender(push, "user/versions", seed=1)
    second, new = sender(push, "user/versions", seed=2)
    assert first != second and not torch.equal(old, new)
    assert torch.equal(receiver(use, "user/versions", revision=first)[1], old)
    assert torch.equal(receiver(use, "user/versions")[1], new)
    config = json.loads(hub.repositories["user/versions"].find("main").files["adapter_config.json"].data)
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, hub.repositories[BASE].branches["main"])
    assert "at revision 'no'" in receiver(error, use, "user/versions", revision="no")


def test_a_private_adapter_needs_a_token_and_the_error_says_so(sender, receiver):
    _, output = sender(push, "user/secret", private=True)
    for token in (None, "hf_other"):
        message = receiver(error, use, "user/secret", token=token)
        assert message.startswith("OSError: Found no 'user/secret'") and "hf auth login" in message
    assert torch.equal(receiver(use, "user/secret", token="hf_user")[1], output)


def test_what_is_missing_or_misspelt_is_an_error_that_says_what_to_do(receiver):
    assert "knows no such repository" in receiver(error, use, "user/nothing")
    assert "Found no adapter_config.json in 'user/base'" in receiver(error, use, BASE)
    assert "cannot be a repository" in receiver(error, use, "no/such/folder")


def test_a_file_that_is_too_large_is_not_fetched(sender, receiver):
    sender(push, "user/large")
    message = receiver(error, use_bounded, "user/large", 100)
    assert "Found adapter_model.safetensors of 'user/large'" in message and "is not loaded" in message
    assert receiver(is_cached, "user/large", "adapter_config.json")
    assert not receiver(is_cached, "user/large", "adapter_model.safetensors")


def test_an_adapter_from_the_hub_does_not_choose_a_folder_of_this_machine(hub, sender, receiver, tmp_path):
    sender(push, "user/folder")
    repository = hub.repositories["user/folder"]
    BACKBONES["vit"].build().save_pretrained(tmp_path / "base")
    assert sender(error, rebase, "user/folder", str(tmp_path / "base")) is None
    assert repository.find("main").files["adapter_config.json"].data.count(b"base_model_name_or_path") == 1
    message = receiver(error, use, "user/folder")
    assert f"the folder '{tmp_path / 'base'}' as base model in an adapter from the Hub" in message


def test_an_adapter_that_was_fetched_once_loads_without_the_hub(hub, sender, receiver):
    _, output = sender(push, "user/offline")
    assert torch.equal(receiver(use, "user/offline")[1], output)
    del hub.requests[:]
    assert torch.equal(receiver(use_offline, "user/offline")[1], output)
    assert not hub.requests
    assert "Found no copy of adapter_config.json" in receiver(error, use_offline, "user/never-fetched")


def test_pefts_loader_refuses_a_repository_of_pickles(sender, receiver):
    sender(push, "user/pickles")
    sender(replace_by_pickle, "user/pickles")
    assert "No pickle is loaded" in receiver(error, use_with_peft, "user/pickles")
    assert "pickles are not loaded" in receiver(error, use, "user/pickles")


@pytest.mark.parametrize("route", ["preupload", "upload", "commit"])
def test_a_broken_upload_leaves_the_adapter_as_it_was(route, hub, sender, receiver):
    name = f"user/broken-{route}"
    first, output = sender(push, name, seed=1)
    hub.fail(route)
    assert sender(error, push, name, seed=2) is not None
    assert hub.repositories[name].branches == {"main": first}
    assert torch.equal(receiver(use, name)[1], output)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        for label, value in (("black", 20), ("white", 230)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (20 + number, 24), value + number).save(folder / split / label / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("options", [[], ["--method=provpt", "--ema_decay=0.5"], ["--method=lora"]])
def test_training_leaves_a_repository_that_works_by_itself(options, drawings, hub, sender, receiver):
    name = f"user/trained-{len(options)}-{''.join(options)[9:13] or 'vapt'}"
    results = sender(train_and_push, drawings, name, *options)
    files = hub.repositories[name].find("main").files
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pth", ".pkl"))]
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors", "id2label.json", "metrics.json"}
    assert own | {"preprocessor_config.json"} <= set(files)
    names, output, size = receiver(use, name)
    assert names == ["black", "white"] and size["height"] == IMAGE_SIZE[0] and len(output[0]) == 2
    card = ModelCard(files["README.md"].data.decode())
    assert (card.data.license, card.data.base_model, card.data.pipeline_tag) == ("mit", BASE, "image-classification")
    assert card.data.eval_results[0].metric_value == results["test_accuracy"]
    assert f'load_image_classifier("{name}")' in card.text
    assert "attention.png" in files and "](attention.png)" in card.text or options == ["--method=lora"]
    if "--method=provpt" in options:
        assert "prompt_distribution.png" in files and "ema/adapter_model.safetensors" in files
        assert receiver(use, name, subfolder="ema")[0] == names
    assert all(tensor.isfinite().all() for tensor in load(files["adapter_model.safetensors"].data).values())
