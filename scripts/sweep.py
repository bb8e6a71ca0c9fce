"""Search learning rate, weight decay and other settings on validation images, then train and test the best one.

The published protocol of VPT and its successors: every point of a grid is trained on the train split and scored on the
validation split; the best one is trained anew on both together, once for each final seed, and tested once each.

    python scripts/sweep.py --config configs/vpt/published.yaml --dataset_name vtab/cifar100 \\
        --preprocessing published --output_dir outputs/sweep/vpt/cifar100

tries the published 10 × 4 grid. All settings of scripts/train.py are settings here, and any of them can be an axis:

    python scripts/sweep.py --config configs/vpt/digits.yaml --output_dir outputs/sweep/digits \\
        --search_space learning_rate=0.1,0.05,0.01 weight_decay=0,1e-4 num_virtual_tokens=5,20 --final_seeds 0 1 2

Some of many settings instead of all, chosen by Optuna's TPE:

    python scripts/sweep.py --config configs/vpt/digits.yaml --output_dir outputs/sweep/tpe \\
        --search_space learning_rate=0.3,0.001 num_virtual_tokens=1,50 --sampler tpe --num_trials 20

A killed sweep goes on when the same command is given again. A trial that ends with an error, too little memory for
one, stops none of the others; the sweep stops before it chooses then, and tries it once more when it is started
again. Several processes share the work when each is started with the same command, on one machine (each with a
GPU of its own by CUDA_VISIBLE_DEVICES) or on many with `--storage postgresql://user@host/name`. What is done,
and what is written, is said in `hf_vpt.sweep.run_sweep`.
"""

from hf_vpt.sweep import parse_sweep, run_sweep


def main() -> None:
    plan = parse_sweep()
    results = run_sweep(plan)
    score = results["test"][f"test_{plan.metric}"]
    spread = "" if score["std"] is None else f" ± {score['std']:.4f}"
    print(f"Test {plan.metric} {score['mean']:.4f}{spread} over seeds {', '.join(map(str, plan.sweep.final_seeds))}.")
    print(f"Saved in {plan.folder}")


if __name__ == "__main__":
    main()
