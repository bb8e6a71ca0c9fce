"""Settings of data: which images are learned from, and how they are prepared."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..choices import check_choice
from .cache import CacheDtype
from .decoding import BrokenImages
from .preprocessing import Preprocessing, check_preprocessing, choose_augmentation
from .processing import Augmentation
from .sources import resolve_variant


@dataclass
class DataArguments:
    """Which images are learned from, and how they are prepared; see `hf_vpt.data.load_image_dataset`.

    Args:
        dataset_name: `"digits"`, `"drawn/<task>"`, `"vtab/<task>"`, `"fgvc/<set>"`, a folder, a list of image files
            (.csv, .tsv, .json, .jsonl), or a data set id on the Hub.
        dataset_config_name: Configuration of a data set that has several.
        dataset_revision: Branch, tag or commit of a data set on the Hub.
        dataset_variant: Which copy of a benchmark: `"zip"` or `"full"` for VTAB-1k, `"hub"`, `"official"` or `"lists"`
            for FGVC; see `hf_vpt.data.sources`. Scores on two variants do not compare.
        dataset_dir: Folder or archive of a benchmark that is on the disk already.
        image_column: Column of the images. Default: found by its type.
        label_column: Column of the classes. Default: found by its type or name.
        validation_fraction: Share of the training images set aside for validation where no split is published.
        test_fraction: Share set aside for the test where no split is published.
        split_seed: Decides which images are set aside, and what drawn data sets show; independent of `seed`, so that
            runs with different seeds share their splits.
        images_per_class: Few-shot learning: training images of each class that are kept, drawn by `split_seed`; with
            `broken_images: skip` among those that can be read.
        validation_images_per_class: The same for the validation split. The test split is never cut.
        train_on_validation: Train on validation images too, once everything is chosen, as final runs on VTAB-1k do.
            They are not scored at the end, and cannot choose an epoch (`load_best_model_at_end: false`).
        augmentation: What training images go through: `"none"`, `"crop_flip"` for random crops and flips, or
            `"affine"` for small rotations, shifts and scales; see `hf_vpt.data.ImageTransform`.
        preprocessing: `"processor"` for the backbone's own image processor, or `"published"` for that of published
            scores on VTAB-1k and FGVC, random crops and flips in training included; see `choose_processor`.
        broken_images: What happens to images that cannot be read: `"stop"` names the first one that training meets and
            ends; `"skip"` leaves them out and counts them. Unless images are streamed, all are then read
            once first.
        streaming: Read images when they are needed instead of downloading and converting the data set first. A run is
            then counted in steps: it needs `max_steps`.
        shuffle_buffer_size: Images of a stream, not decoded, among which the next one to train on is drawn.
        num_held_out: Images that become the validation or test split where a stream publishes none.
        cache_images: Keep images decoded and resized on the disk, 8 bits a number (150 KB for 224 × 224 pixels), from
            the first epoch on; see `hf_vpt.data.ResizedImages`. Not with `"crop_flip"`, which resizes at random.
        cache_prefix: Run the frozen blocks before the first one with prompts once for each image, keep what they make
            of it on the disk (600 KB in ViT-B/16 at 224 pixels), and start there in every epoch; see
            `hf_vpt.training.PrefixCaching`. For prompts in later blocks (`layers_to_transform`), or a linear probe,
            without augmentation.
        cache_dtype: Number format of these; results with `"float32"` are those without a cache.
        cache_dir: Folder of both caches; it may be deleted whenever nothing trains. Default: `hf_vpt` in Hugging
            Face's own (`HF_HOME`).
    """

    _argument_group_name = "data"

    dataset_name: str = field(
        default="digits",
        metadata={"help": "digits, drawn/counting, vtab/<task>, fgvc/<set>, a folder, a list, or an id on the Hub."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    dataset_variant: str | None = field(
        default=None, metadata={"help": "Copy of a benchmark: zip, full; hub, official, lists."}
    )
    dataset_dir: str | None = field(default=None, metadata={"help": "Folder or archive of a benchmark on the disk."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found if left out."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes; found if left out."})
    validation_fraction: float = field(default=0.2, metadata={"help": "Share of train set aside for validation."})
    test_fraction: float = field(default=0.2, metadata={"help": "Share of train set aside if there is no test split."})
    split_seed: int = field(default=0, metadata={"help": "Decides which images are set aside."})
    images_per_class: int | None = field(default=None, metadata={"help": "Training images kept of each class."})
    validation_images_per_class: int | None = field(default=None, metadata={"help": "The same for validation."})
    train_on_validation: bool = field(default=False, metadata={"help": "Add the validation images to train."})
    augmentation: Augmentation = field(default="none", metadata={"help": "Random changes to training images."})
    preprocessing: Preprocessing = field(default="processor", metadata={"help": "The backbone's own, or published."})
    broken_images: BrokenImages = field(default="stop", metadata={"help": "At an image that cannot be read."})
    streaming: bool = field(default=False, metadata={"help": "Read images when needed; the run needs max_steps."})
    shuffle_buffer_size: int = field(default=1000, metadata={"help": "Images of a stream that are shuffled at once."})
    num_held_out: int = field(default=1000, metadata={"help": "Images for a split that a stream does not publish."})
    cache_images: bool = field(default=False, metadata={"help": "Keep decoded and resized images on the disk."})
    cache_prefix: bool = field(default=False, metadata={"help": "Keep the inputs of the first block with prompts."})
    cache_dtype: CacheDtype = field(default="float32", metadata={"help": "Number format of cache_prefix."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder of the caches."})

    def __post_init__(self):
        for name in ("shuffle_buffer_size", "num_held_out", "images_per_class", "validation_images_per_class"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}. It must be at least 1: correct it, or leave it out.")
        resolve_variant(self.dataset_name, self.dataset_variant, self.dataset_dir)
        check_choice("broken_images", self.broken_images, BrokenImages)
        check_choice("augmentation", self.augmentation, Augmentation)
        check_preprocessing(self.preprocessing, self.dataset_name, self.augmentation)
        check_choice("cache_dtype", self.cache_dtype, CacheDtype)
        if self.cache_images:
            self._check_cache("cache_images", ("none", "affine"))
        if self.cache_prefix:
            self._check_cache("cache_prefix", ("none",))

    def _check_cache(self, name: str, augmentations: tuple[str, ...]) -> None:
        if self.streaming:
            raise ValueError(
                f"{name} and streaming are both set. A cache needs images that can be counted: leave one of them out."
            )
        augmentation = choose_augmentation(self.augmentation, self.preprocessing, self.dataset_name)
        if augmentation not in augmentations:
            raise ValueError(
                f"{name} is set with augmentation '{augmentation}', which makes another image of it each time. "
                f"It needs augmentation {' or '.join(augmentations)}: choose that, or leave {name} out."
            )
