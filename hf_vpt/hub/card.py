"""The model card of an adapter, written from what lies beside it in its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..demo import DEMO


CARD_FILE = "README.md"
UNNAMED = "user/name"
METRICS_FILE = "metrics.json"
# Pictures that are shown where they lie in the folder, and what they show.
DISTRIBUTION_PICTURE, ATTENTION_PICTURE = "prompt_distribution.png", "attention.png"
PICTURES = {
    DISTRIBUTION_PICTURE: "Prompts in each block while training.",
    ATTENTION_PICTURE: "Mean attention on test images: the share that goes to prompts, and where the rest goes.",
}
MARK = "<!-- Written by hf_vpt. To keep changes of your own, remove this line. -->"
# Lines by which cards of PEFT, of Trainer and of ours are known. Any other card is its author's.
_OF_PEFT = "# Model Card for Model ID"
_OF_TRAINER = "<!-- This model card has been generated automatically"
_MOST_CLASSES, _LONGEST_NAME = 50, 100
# Among what `train_classifier` writes.
_OF_A_RUN = {"test_accuracy", "test_mean_class_accuracy", "seed", "settings", "versions", "dataset_name"}
_OF_A_RUN |= {"dataset_variant", "dataset_fingerprint", "num_images", "train_on_validation", "global_batch_size"}


def update_model_card(folder: str | Path, repository: str | None = None, license: str | None = None) -> None:
    """Replace the card that PEFT or Trainer wrote for an adapter, or for the repository around it, by one that tells.

    Args:
        folder: Folder of an adapter.
        repository: See `write_model_card`.
        license: See `write_model_card`.
    """
    folder = Path(folder)
    if (folder / CARD_FILE).is_file():
        if _is_automatic(folder / CARD_FILE):
            write_model_card(folder, repository, license)
    # PEFT writes one card for all adapters of a model, which lie in folders below it.
    elif (folder.parent / CARD_FILE).is_file() and _is_automatic(folder.parent / CARD_FILE):
        write_model_card(folder.parent, repository, license)


def _is_automatic(card: Path) -> bool:
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.strip() in (_OF_PEFT, MARK) or line.startswith(_OF_TRAINER) for line in lines)


def write_model_card(folder: str | Path, repository: str | None = None, license: str | None = None) -> None:
    """Write the card of an adapter: what it is, the lines that use it, its scores, and how it was trained.

    All of it is read from the folder: the configuration, the weights' shapes, `metrics.json` and pictures, where they
    are. Scores stand in the card's metadata too, as the Hub shows them.

    Args:
        folder: Folder of an adapter, or of several in subfolders.
        repository: Id on the Hub, for the lines of code.
        license: Licence of the weights, by the Hub's names. Default: what the card said before, else `"unknown"`.
    """
    folder = Path(folder)
    card = folder / CARD_FILE
    if license is None and card.is_file():
        license = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    places = [folder] if (folder / CONFIG_NAME).is_file() else []
    subfolders = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    subfolders = [place for place in subfolders if not place.name.startswith(PREFIX_CHECKPOINT_DIR)]
    configs = [_read(place / CONFIG_NAME) for place in places + subfolders]
    if not configs:
        return
    config, metrics = configs[0], _read(folder / METRICS_FILE)
    if not isinstance(metrics, dict) or not metrics.keys() >= _OF_A_RUN:
        metrics = {}  # of somebody else's
    name = repository or UNNAMED
    metadata = _metadata(config, metrics, name, license or "unknown")
    if places:
        sections = [f"# {_title(config, metrics)}", _summary(config, folder), _usage(name), _scores(metrics)]
        sections += [_pictures(folder), _training(metrics), _classes(config)]
    else:
        sections = [f"# Adapters of {_base_of(config)}", _usage(name, subfolders[0].name)]
    sections = [MARK, *sections, _subfolders(subfolders)]
    content = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{content}\n").save(card)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _method(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name of an adapter's method, and its paper on arXiv."""
    from ..tuners import METHODS  # made of configurations, which write cards

    for known in METHODS.values():
        if known.method_name == config["peft_type"]:
            return known.title, known.paper
    return config["peft_type"], None


def _base_of(config: Mapping[str, Any]) -> str:
    name = config.get("base_model_name_or_path") or "a vision transformer"
    return "the demo backbone of hf_vpt" if name == DEMO else _plain(_short(name))


def _short(name: str) -> str:
    """A name on the Hub as it is; of a path on somebody's machine the last part."""
    return name if len(Path(name).parts) <= 2 and not Path(name).is_absolute() else Path(name).name


def _is_hub_id(name: str | None) -> bool:
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return bool(name) and name != DEMO and not Path(name).exists()


def _plain(text: str) -> str:
    """One line of text that Markdown and HTML take for nothing else."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)[:_LONGEST_NAME]
    return re.sub(r"([\\`*{}\[\]()<>#|~&$]|\b_|_\b)", r"\\\1", text)


def _title(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    data = f" for {_short(metrics['dataset_name'])}" if metrics.get("dataset_name") else ""
    return f"{_method(config)[0]} adapter of {_base_of(config)}{data}"


def _metadata(config: Mapping[str, Any], metrics: Mapping[str, Any], name: str, license: str) -> ModelCardData:
    title, paper = _method(config)
    tags = ["hf_vpt", "visual-prompt-tuning", title.lower()] + ([f"arxiv:{paper}"] if paper else [])
    base, data = config.get("base_model_name_or_path"), metrics.get("dataset_name")
    optional: dict[str, Any] = {}
    if _is_hub_id(base):
        optional |= {"base_model": base, "base_model_relation": "adapter"}
        tags.append(f"base_model:adapter:{base}")
    if metrics:
        details = [f"seed {metrics['seed']}", metrics["dataset_variant"]]
        optional["model_name"] = name.split("/")[-1]
        optional["metrics"] = ["accuracy"]
        optional["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type=_short(data),
                dataset_name=_short(data),
                dataset_config=metrics["dataset_variant"],
                dataset_split="test",
                metric_type=metric,
                metric_name=f"{metric.replace('_', ' ').capitalize()} ({', '.join(filter(None, details))})",
                metric_value=metrics[f"test_{metric}"],
            )
            for metric in ("accuracy", "mean_class_accuracy")
        ]
    return ModelCardData(
        library_name="peft", pipeline_tag="image-classification", license=license, tags=tags, **optional
    )


def _summary(config: Mapping[str, Any], folder: Path) -> str:
    title, paper = _method(config)
    source = f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else ""
    classes = f" to tell {len(config['label_names'])} classes apart" if config.get("label_names") else ""
    revision = f", revision {_plain(config['revision'])}" if config.get("revision") else ""
    lines = [f"Adapts {_base_of(config)}{revision}{classes}, by {title}{source}. The backbone stays as it is."]
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
        heads = [f".{name}." for name in config.get("modules_to_save") or ()]
        head = sum(size for key, size in sizes.items() if any(name in f".{key}" for name in heads))
        lines.append(
            f"The file holds {sum(sizes.values()) - head:,} numbers of the adapter and {head:,} of the head "
            f"({weights.stat().st_size / 1e6:,.2f} MB)."
        )
    return " ".join(lines)


def _usage(name: str, subfolder: str | None = None) -> str:
    inside = f', subfolder="{subfolder}"' if subfolder else ""
    comment = "  # the name of this repository, or its folder" if name == UNNAMED else ""
    return f"""## Use

```python
import hf_vpt
from transformers import pipeline

model, processor = hf_vpt.load_image_classifier("{name}"{inside}){comment}
classify = pipeline("image-classification", model=model, image_processor=processor)
classify("photo.jpg")
```

With PEFT alone, `import hf_vpt` comes first: it tells PEFT about the method.

```python
import hf_vpt
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, "{name}"{inside})
```"""


def _scores(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    rows = []
    for split in ("validation", "test"):
        if f"{split}_accuracy" in metrics:
            accuracy, by_class = metrics[f"{split}_accuracy"], metrics[f"{split}_mean_class_accuracy"]
            rows.append(f"| {split} | {metrics['num_images'][split]} | {accuracy:.2%} | {by_class:.2%} |")
    variant = f", variant {metrics['dataset_variant']}" if metrics["dataset_variant"] else ""
    prints = ", ".join(f"{split} `{value}`" for split, value in metrics["dataset_fingerprint"].items())
    return "\n".join(
        [
            "## Scores\n",
            "| split | images | accuracy | mean accuracy of classes |",
            "|---|---|---|---|",
            *rows,
            f"\nOne run, seed {metrics['seed']}, on {_short(metrics['dataset_name'])}{variant}. Fingerprints of the "
            f"splits: {prints}. Scores compare with those on the same images alone.",
        ]
    )


def _training(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    own = {name: value for name, value in metrics["settings"].items() if value not in (None, False, [])}
    own |= {name: metrics[name] for name in ("num_train_epochs", "max_steps", "global_batch_size", "num_processes")}
    own |= {name: metrics[name] for name in ("preprocessing", "augmentation", "seed")}
    listed = "\n".join(f"- {name}: {value}" for name, value in own.items() if value is not None)
    versions = ", ".join(f"{package} {version}" for package, version in metrics["versions"].items())
    trained_on = "train and validation images" if metrics["train_on_validation"] else "train images"
    return (
        f"## Training\n\nOn {metrics['num_images']['train']} {trained_on}, with `scripts/train.py` of hf_vpt:\n\n"
        f"{listed}\n\nVersions: {versions}."
    )


def _subfolders(places: list[Path]) -> str:
    if not places:
        return ""
    listed = "\n".join(f'- `subfolder="{place.name}"`' for place in places)
    return f"## Adapters in subfolders\n\n{listed}"


def _classes(config: Mapping[str, Any]) -> str:
    names = config.get("label_names")
    if not names:
        return ""
    rest = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    return f"## Classes\n\n{', '.join(map(_plain, names[:_MOST_CLASSES]))}{rest}"


def _pictures(folder: Path) -> str:
    return "\n\n".join(f"![{text}]({name})\n\n{text}" for name, text in PICTURES.items() if (folder / name).is_file())
