"""Adapt a vision transformer to a data set with visual prompts, or train a baseline.

Handwritten digits with the packaged backbone, offline, in minutes on two CPU cores:

    python scripts/train.py --config configs/vapt/digits.yaml

Any setting can be overridden; those of the method are options like all others:

    python scripts/train.py --config configs/vpt/digits.yaml --num_virtual_tokens 5 --learning_rate 0.5 --seed 1

A folder of images, one subfolder a class, and a backbone from the Hub, on all GPUs of a machine:

    accelerate launch scripts/train.py --method vapt --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name path/to/images --augmentation crop_flip --learning_rate 1e-3 --num_train_epochs 50 \\
        --warmup_epochs 5 --bf16 --dataloader_num_workers 8 --output_dir outputs/images

A data set too large to download, read from the Hub while training; such a run is counted in steps:

    python scripts/train.py --method bpt --dataset_name user/name --streaming --max_steps 10000

Go on after an interruption, or publish the result:

    python scripts/train.py --config configs/vapt/digits.yaml --resume_from_checkpoint last
    python scripts/train.py --config configs/vapt/digits.yaml --push_to_hub --hub_model_id user/name

`--help` after `--method NAME` lists every setting. What is written is said in `hf_vpt.training.train_classifier`.
"""

from hf_vpt.training import parse_arguments, train_classifier


def main() -> None:
    settings = parse_arguments()
    results = train_classifier(settings)
    if settings.training.process_index == 0:
        epoch = results["best_epoch"]
        when = f"step {results['best_step']}" if epoch is None else f"epoch {epoch:g}"
        validation = "trained on validation images too"
        if "validation_accuracy" in results:
            validation = f"validation accuracy {results['validation_accuracy']:.4f}"
        print(
            f"Test accuracy {results['test_accuracy']:.4f}, {validation} ({when}), "
            f"{results['trained_parameters']:,} trained parameters of which "
            f"{results['trained_parameters_without_head']:,} outside the head."
        )
        if "test_ema_accuracy" in results:
            if "validation_ema_accuracy" in results:
                validation = f"validation accuracy {results['validation_ema_accuracy']:.4f}"
            print(
                f"Averaged weights: test accuracy {results['test_ema_accuracy']:.4f}, {validation}, "
                "in the subfolder ema."
            )
        print(f"Saved in {settings.training.output_dir}")


if __name__ == "__main__":
    main()
