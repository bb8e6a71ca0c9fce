"""The benchmarks VTAB-1k and FGVC, lists of image files, and WebDataset shards.

`vtab/<task>` has two variants. `zip`: the prepared copy on the Hub, `vtab-1k.zip`, or its folder on the disk, with
800 images to train on, 200 to validate on and the test images its lists name. `full`: the whole data set in
WebDataset shards, of which 1,000 training images are drawn without regard to their class, as VTAB-1k does, by
`numpy.random.default_rng(seed).permutation`: the first 800 are train, the next 200 validation, and all test images
are the test. These are not the 1,000 images of the first variant.

`fgvc/<set>` has two variants too. `hub`: a repository on the Hub. `official`: the folder that the authors of the set
publish. Oxford Flowers has a validation split; of the others, validation gets 10 % of the training images, stratified
by class and drawn by the seed, which are the sizes that the paper of VPT (arXiv 2203.12119, table 7) reports.
"""

from __future__ import annotations

from datasets import DatasetDict

from .table import FGVC, TASKS, VARIANTS, VTAB


__all__ = [
    "FGVC",
    "VTAB",
    "benchmark_validation_fraction",
    "is_benchmark",
    "load_benchmark",
    "resolve_variant",
]

FGVC_VALIDATION_FRACTION = 0.1


def is_benchmark(name: str) -> bool:
    """Whether a data set's name is that of a benchmark: `vtab/<task>` or `fgvc/<set>`."""
    return name.partition("/")[0] in TASKS and "/" in name


def benchmark_validation_fraction(name: str) -> float | None:
    """Return the share of the training images that an FGVC set without validation split sets aside; else None."""
    return FGVC_VALIDATION_FRACTION if is_benchmark(name) and name.startswith("fgvc/") else None


def resolve_variant(name: str, variant: str | None = None, data_dir: str | None = None) -> str | None:
    """Return the variant of a benchmark that will be read, None for other data sets. Nothing is read for it.

    Args:
        name: Name of the data set.
        variant: What the user asked for. Default: `zip` for VTAB-1k; for FGVC `official` if there is a `data_dir`, or
            else `hub`.
        data_dir: Folder or archive of the benchmark on the disk.

    Raises:
        ValueError: The task or the variant is unknown, or they and `data_dir` do not go together.
    """
    if not is_benchmark(name):
        if given := [
            option for option, value in (("dataset_variant", variant), ("dataset_dir", data_dir)) if value is not None
        ]:
            raise ValueError(
                f"Found {' and '.join(given)} with the data set '{name}'. Only benchmarks, vtab/<task> and "
                "fgvc/<set>, have variants: leave it out, or name the folder itself as the data set."
            )
        return None
    benchmark, _, task = name.partition("/")
    if task not in TASKS[benchmark]:
        raise ValueError(
            f"Found the data set '{name}'. {benchmark} has {', '.join(sorted(TASKS[benchmark]))}: choose one of "
            f"them, for example {benchmark}/{next(iter(TASKS[benchmark]))}."
        )
    if variant is not None and variant not in VARIANTS[benchmark]:
        raise ValueError(
            f"dataset_variant is '{variant}'. {name} has the variants {' and '.join(VARIANTS[benchmark])}: choose "
            "one, or leave it out."
        )
    if benchmark == "vtab":
        return variant or "zip"
    repo = FGVC[task].repo
    variant = variant or ("official" if data_dir is not None or repo is None else "hub")
    if variant == "hub" and data_dir is not None:
        raise ValueError(
            f"Found dataset_variant hub and dataset_dir '{data_dir}' for {name}. That variant is read from the Hub: "
            "leave dataset_dir out, or choose the variant official for a folder as its authors publish it."
        )
    if variant == "hub" and repo is None:
        raise ValueError(
            f"Found dataset_variant hub for {name}. No public copy of it on the Hub is known: download it from its "
            "authors, unpack it, and pass the folder as dataset_dir."
        )
    return variant


def load_benchmark(
    name: str,
    variant: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load a benchmark's published splits; for VTAB-1k these are all three.

    Args:
        name: `vtab/<task>` or `fgvc/<set>`.
        variant: See `resolve_variant`.
        data_dir: Folder or archive of the benchmark on the disk.
        revision: Branch, tag or commit of its repository on the Hub.
        cache_dir: Folder for what is downloaded and unpacked. Default: those of `huggingface_hub` and `datasets`.
        seed: Decides which images the variant `full` draws.

    Raises:
        ValueError: Something is unknown, or what was found is not what the benchmark needs.
        FileNotFoundError: Files are missing, or cannot be downloaded.
    """
    from .fgvc import load_fgvc
    from .vtab import load_vtab

    variant = resolve_variant(name, variant, data_dir)
    benchmark, _, task = name.partition("/")
    if variant == "official" and data_dir is None:
        raise ValueError(
            f"Found {name} without dataset_dir. Its variant official is a folder on the disk: download it from its "
            "authors, unpack it, and pass the folder as dataset_dir."
        )
    if benchmark == "vtab":
        return load_vtab(task, variant, data_dir, revision, cache_dir, seed)
    return load_fgvc(task, variant, data_dir, revision, cache_dir)
