"""One training run from settings to scores: train, choose on validation, test once, save, push."""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import TrainerState, enable_full_determinism, set_seed
from transformers.utils import is_matplotlib_available, logging

from ..data import collate_images, load_image_dataset
from ..data.preprocessing import choose_processor
from ..hub.card import ATTENTION_PICTURE, DISTRIBUTION_PICTURE, METRICS_FILE
from ..tuners.base import PromptConfig
from .comparison import describe_data
from .identity import RunIdentity
from .images import count_in_steps, prepare_images, sample_batches
from .metrics import ComputeMetrics
from .models import count_trained_parameters, load_classifier, load_image_processor, prepare_for_training
from .parsing import Settings
from .prefix import cache_prefixes, check_prefix_caching
from .record import describe_settings
from .relocation import RELOCATIONS_FILE, RelocationCallback
from .sharding import gathered
from .shared import SharedLoader
from .steps import StepRecorder
from .trainer import ImageClassificationTrainer
from .trouble import PlateauWarning


logger = logging.get_logger(__name__)

TIMINGS_FILE = "timings.json"
NUM_DRAWN_IMAGES = 8
RECORDED_VERSIONS = ("hf_vpt", "torch", "torchvision", "transformers", "peft", "accelerate", "datasets")


def train_classifier(settings: Settings, shared: SharedLoader | None = None) -> dict[str, Any]:
    """Train a classifier, score it, and save it with everything needed to use it again.

    Parameters are fitted on the train split. With `load_best_model_at_end` (the default) the epoch with the best
    validation score is kept. The test split is looked at once, after that. With `train_on_validation` parameters are
    fitted on both other splits, and the last epoch is kept.

    With `ema_decay` the averaged weights are scored too (`validation_ema_accuracy`, `test_ema_accuracy`) and lie in
    the folder `ema` of `output_dir`, complete like the last ones beside them.

    Written to `output_dir`: the adapter with its head (or the whole model, for a baseline), the image processor, the
    names of the classes, `metrics.json`, and `timings.json` with the seconds of training (on the clock, and of this
    process on the CPU) since the run began or last went on (`is_whole` says which), and the most memory it took of a
    CUDA device meanwhile.
    With `push_to_hub` the folder goes to the Hub too.

    Args:
        settings: What `parse_arguments` returns.
        shared: What several runs of this process load once. Default: everything is loaded for this run.

    Returns:
        What `metrics.json` holds: scores on both splits (on test alone where validation images were trained on), the
        epoch and step they belong to, numbers of trained parameters, seed, settings, variant and fingerprints of the
        data, and versions. All of it is the same for a run that was interrupted and went on. Epochs, and numbers of
        images that nobody has counted, are None where images are streamed.
    """
    trainer, data = build_trainer(settings, shared)
    measures_memory = settings.training.device.type == "cuda"
    if measures_memory:
        torch.cuda.reset_peak_memory_stats()
    start = time.process_time()
    outcome = trainer.train(resume_from_checkpoint=settings.training.resume_from_checkpoint)
    cpu_seconds = time.process_time() - start
    peak_memory = torch.cuda.max_memory_allocated() if measures_memory else None
    has_validation = not settings.data.train_on_validation
    validation = trainer.evaluate(metric_key_prefix="validation") if has_validation else {}
    # predict, not evaluate: callbacks that watch evaluations, early stopping for one, must not see the test split.
    test = trainer.predict(data["test"], metric_key_prefix="test").metrics

    best_is_loaded, is_stream = settings.training.load_best_model_at_end, settings.data.streaming
    results = {
        **{name: value for name, value in {**test, **validation}.items() if "accuracy" in name or "loss" in name},
        "best_epoch": None if is_stream else epoch_of_weights(trainer.state, best_is_loaded),
        "best_step": trainer.state.best_global_step if best_is_loaded else trainer.state.global_step,
        **count_trained_parameters(trainer.accelerator.unwrap_model(trainer.model)),
        "method": settings.model.method,
        "model_name_or_path": settings.model.model_name_or_path,
        **describe_data(settings.data, data),
        "settings": describe_settings(settings),
        "seed": settings.training.seed,
        "num_train_epochs": None if is_stream else settings.training.num_train_epochs,
        "max_steps": trainer.state.max_steps,
        "num_processes": settings.training.world_size,
        "global_batch_size": settings.training.global_batch_size,
        "versions": {package: metadata.version(package) for package in RECORDED_VERSIONS}
        | {"python": platform.python_version()},
    }
    if trainer.is_world_process_zero():
        output_dir = Path(settings.training.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        timings = {"train_seconds": outcome.metrics["train_runtime"], "train_cpu_seconds": cpu_seconds}
        timings |= {"peak_memory_bytes": peak_memory, "is_whole": trainer.went_on_from is None}
        for name, content in ((METRICS_FILE, results), (TIMINGS_FILE, timings)):
            (output_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if settings.training.push_to_hub:
        if trainer.is_world_process_zero():
            draw_adapter(trainer, data["test"])
        trainer.push_to_hub(tasks="image-classification", dataset=settings.data.dataset_name)
    else:
        trainer.save_model()
    return results


def build_trainer(
    settings: Settings, shared: SharedLoader | None = None
) -> tuple[ImageClassificationTrainer, dict[str, Any]]:
    """Load data and backbone, and put them together to a trainer that has not trained yet.

    Args:
        settings: What `parse_arguments` returns.
        shared: What several runs of this process load once. Default: everything is loaded for this run.

    Returns:
        The trainer, and the three splits with their transforms.
    """
    load_images = load_image_dataset if shared is None else shared.load_image_dataset
    load_model = load_classifier if shared is None else shared.load_classifier
    model_args, data_args, training_args, peft_config = settings
    check_prefix_caching(settings)
    if data_args.streaming:
        count_in_steps(training_args, peft_config)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and training_args.world_size == 1:
        raise ValueError(
            f"Found {started} processes of which each would train alone and write to '{training_args.output_dir}'. "
            "They need to know that they belong together: on a CPU, add --use_cpu."
        )
    if data_args.train_on_validation and training_args.load_best_model_at_end:
        raise ValueError(
            "Found train_on_validation and load_best_model_at_end. Images that are trained on cannot tell the best "
            "epoch: add --no_load_best_model_at_end, which keeps the last one."
        )
    # The head and the prompts are drawn before Trainer sets the seed.
    (enable_full_determinism if training_args.full_determinism else set_seed)(training_args.seed)
    with training_args.main_process_first(desc="load the data set"):
        data = load_images(
            data_args.dataset_name,
            config_name=data_args.dataset_config_name,
            revision=data_args.dataset_revision,
            variant=data_args.dataset_variant,
            data_dir=data_args.dataset_dir,
            image_column=data_args.image_column,
            label_column=data_args.label_column,
            validation_fraction=data_args.validation_fraction,
            test_fraction=data_args.test_fraction,
            seed=data_args.split_seed,
            streaming=data_args.streaming,
            num_held_out=data_args.num_held_out,
            images_per_class=data_args.images_per_class,
            validation_images_per_class=data_args.validation_images_per_class,
            train_on_validation=data_args.train_on_validation,
            broken_images=data_args.broken_images,
        )
    if training_args.n_gpu > 1 and peft_config is not None:
        raise ValueError(
            f"Found {training_args.n_gpu} GPUs in one process, which PyTorch's DataParallel would share. Prompts that "
            "blocks share do not survive its copies. Start one process a GPU with `accelerate launch`, or show one "
            "GPU with CUDA_VISIBLE_DEVICES=0."
        )
    if training_args.ddp_find_unused_parameters is None and model_args.method not in ("full", "bias"):
        # All that trains takes part in every step, so processes need not search for what does not.
        training_args.ddp_find_unused_parameters = False
    if training_args.device.type == "cpu":
        # Pinned memory only speeds up copies to an accelerator, and PyTorch warns where there is none.
        training_args.dataloader_pin_memory = False
    processor = load_image_processor(model_args)
    processor = choose_processor(processor, data_args.preprocessing, data_args.dataset_name)
    model = load_model(model_args, data["train"].features["label"].names)
    model = prepare_for_training(model, model_args.method, peft_config, model_args.model_revision)

    data = prepare_images(data, processor, data_args, training_args)
    trainer = ImageClassificationTrainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collate_images,
        processing_class=processor,
        compute_metrics=ComputeMetrics(),
    )
    trainer.add_callback(RunIdentity(settings))
    if training_args.record_steps:
        trainer.add_callback(StepRecorder())
    num_classes = data["train"].features["label"].num_classes
    if training_args.plateau_patience:
        trainer.add_callback(PlateauWarning(num_classes, training_args.plateau_patience))
    if model_args.method == "provpt":
        trainer.add_callback(RelocationCallback(trainer))
    if model_args.method == "provpt" and trainer.is_deepspeed_enabled:
        raise ValueError(
            "Found PRO-VPT and DeepSpeed, whose optimizer keeps weights of its own, which a moving prompt does not "
            "change. PRO-VPT needs one process, DDP or FSDP2. Launch it with configs/accelerate/ddp.yaml or "
            "configs/accelerate/fsdp2.yaml."
        )
    if data_args.cache_prefix:
        cache_prefixes(data, trainer, data_args)  # after relocation, which decides on the first block
    # After the trainer has moved the model to its device.
    if isinstance(peft_config, PromptConfig):
        with gathered(model):
            model.base_model.initialize_from_images(sample_batches(data["train"], processor, training_args))
    return trainer, data


def draw_adapter(trainer: ImageClassificationTrainer, images: Dataset | IterableDataset) -> None:
    """Draw what the card of an adapter shows into the output folder, where matplotlib is installed.

    Nothing of single images is published: attention is averaged over 8 of them. A picture that cannot be drawn is
    left out, so that it does not stop what was trained from being published.
    """
    from ..plots import plot_attention, plot_prompt_distribution  # of reports, which read what runs write

    model, folder = trainer.accelerator.unwrap_model(trainer.model), Path(trainer.args.output_dir)
    # Of a sharded model, one process alone cannot run a forward pass.
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not is_matplotlib_available() or not isinstance(model, PeftModel) or is_sharded:
        return
    try:
        relocations = folder / RELOCATIONS_FILE
        if relocations.is_file() and (rounds := json.loads(relocations.read_text(encoding="utf-8"))):
            plot_prompt_distribution(rounds, folder / DISTRIBUTION_PICTURE)
        examples = list(itertools.islice(iter(images), NUM_DRAWN_IMAGES))
        if len(examples) == NUM_DRAWN_IMAGES:
            pixel_values = collate_images(examples)["pixel_values"].to(model.device)
            plot_attention(model, pixel_values, folder / ATTENTION_PICTURE)
    except Exception as error:
        logger.warning(f"A picture for the model card is left out: {error}")


def epoch_of_weights(state: TrainerState, best_is_loaded: bool) -> float:
    """Return the epoch after which the model's present weights were reached."""
    if best_is_loaded:
        for entry in state.log_history:
            if entry["step"] == state.best_global_step:
                return entry["epoch"]
    return state.epoch
