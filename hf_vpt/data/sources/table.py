"""Where the images of the benchmarks are: one table of repositories, folders, variants and numbers of classes."""

from __future__ import annotations

from dataclasses import dataclass


# The prepared VTAB-1k of SSF and its successors: 4.66 GB, one folder a task, with lists of images.
VTAB_REPO, VTAB_FILE = "XiN0919/VTAB-1k", "vtab-1k.zip"


@dataclass(frozen=True)
class VTABTask:
    """One task of VTAB-1k (arXiv 1910.04867).

    Args:
        folder: Its folder in `vtab-1k.zip`.
        full_repo: WebDataset repository of the whole data set on the Hub.
        num_classes: Classes, or bins of the quantity that is asked for.
        num_values: Values of that quantity where the shards of `full_repo` hold it as it was measured; None where they
            hold classes. VTAB makes bins of neighbours, class = ⌊value · num_classes / num_values⌋.
    """

    folder: str
    full_repo: str
    num_classes: int
    num_values: int | None = None


@dataclass(frozen=True)
class FGVCSet:
    """One set of the fine-grained benchmark FGVC.

    Args:
        repo: Repository on the Hub, or None where no clean public copy is known.
        layout: Name of the official layout, as `hf_vpt.data.sources.official` reads it.
        needed: Files that tell the official layout, with alternatives in one tuple.
        num_classes: Classes of the set as published.
    """

    repo: str | None
    layout: str
    needed: tuple[tuple[str, ...], ...]
    num_classes: int


_BIRDS = (("images.txt",), ("image_class_labels.txt",), ("train_test_split.txt",), ("classes.txt",), ("images",))

VTAB = {
    # natural
    "caltech101": VTABTask("caltech101", "clip-benchmark/wds_vtab-caltech101", 102),
    "cifar100": VTABTask("cifar", "clip-benchmark/wds_vtab-cifar100", 100),
    "dtd": VTABTask("dtd", "clip-benchmark/wds_vtab-dtd", 47),
    "flowers102": VTABTask("oxford_flowers102", "clip-benchmark/wds_vtab-flowers", 102),
    "pet": VTABTask("oxford_iiit_pet", "clip-benchmark/wds_vtab-pets", 37),
    "sun397": VTABTask("sun397", "clip-benchmark/wds_sun397", 397),
    "svhn": VTABTask("svhn", "clip-benchmark/wds_vtab-svhn", 10),
    # specialized
    "camelyon": VTABTask("patch_camelyon", "clip-benchmark/wds_vtab-pcam", 2),
    "eurosat": VTABTask("eurosat", "clip-benchmark/wds_vtab-eurosat", 10),
    "resisc45": VTABTask("resisc45", "clip-benchmark/wds_vtab-resisc45", 45),
    "retinopathy": VTABTask("diabetic_retinopathy", "clip-benchmark/wds_vtab-diabetic_retinopathy", 5),
    # structured
    "clevr_count": VTABTask("clevr_count", "clip-benchmark/wds_vtab-clevr_count_all", 8),
    "clevr_distance": VTABTask("clevr_dist", "clip-benchmark/wds_vtab-clevr_closest_object_distance", 6),
    "dmlab": VTABTask("dmlab", "clip-benchmark/wds_vtab-dmlab", 6),
    "dsprites_orientation": VTABTask("dsprites_ori", "clip-benchmark/wds_vtab-dsprites_label_orientation", 16, 40),
    "dsprites_position": VTABTask("dsprites_loc", "clip-benchmark/wds_vtab-dsprites_label_x_position", 16, 32),
    "kitti": VTABTask("kitti", "clip-benchmark/wds_vtab-kitti_closest_vehicle_distance", 4),
    "smallnorb_azimuth": VTABTask("smallnorb_azi", "clip-benchmark/wds_vtab-smallnorb_label_azimuth", 18),
    "smallnorb_elevation": VTABTask("smallnorb_ele", "clip-benchmark/wds_vtab-smallnorb_label_elevation", 9),
}

FGVC = {
    "cub": FGVCSet("bentrevett/caltech-ucsd-birds-200-2011", "birds", _BIRDS, 200),
    "nabirds": FGVCSet(None, "birds", _BIRDS, 555),
    "oxfordflower": FGVCSet(
        "dpdl-benchmark/oxford_flowers102", "flowers", (("imagelabels.mat",), ("setid.mat",), ("jpg",)), 102
    ),
    "stanfordcars": FGVCSet(
        "tanganke/stanford_cars",
        "cars",
        # One list of all images, or the older two; where the devkit lies is up to who unpacked it.
        (
            ("cars_annos.mat", "devkit/cars_train_annos.mat", "cars_train_annos.mat"),
            ("cars_annos.mat", "devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat"),
            ("car_ims", "cars_train"),
        ),
        196,
    ),
    "stanforddogs": FGVCSet(
        "tanganke/stanford_dogs",
        "dogs",
        (("train_list.mat", "lists/train_list.mat"), ("test_list.mat", "lists/test_list.mat"), ("Images",)),
        120,
    ),
}

# Which copies of a benchmark there are; the first one is the default where nothing else decides.
VARIANTS = {"vtab": ("zip", "full"), "fgvc": ("hub", "official", "lists")}
TASKS = {"vtab": VTAB, "fgvc": FGVC}
