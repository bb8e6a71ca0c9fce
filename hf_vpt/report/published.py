"""Scores that papers report, and the setting that they hold for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedScores:
    """Test accuracies in per cent of ViT-B/16, pre-trained with labels on ImageNet-21k.

    Args:
        title: The method, as `hf_vpt.report.rows.TITLES` calls it.
        source: Where they are reported.
        groups: Means over the natural, specialized and structured tasks of VTAB-1k.
        mean_of_tasks: Mean over its 19 tasks.
        mean_of_groups: Mean of the three group means.
        fgvc: Mean over the five sets of FGVC.
    """

    title: str
    source: str
    groups: tuple[float, float, float] | None = None
    mean_of_tasks: float | None = None
    mean_of_groups: float | None = None
    fgvc: float | None = None


# What runs must have in common with the published ones to stand beside them. Other copies of the data have other
# images, and other preprocessing moves single tasks by ten points.
BACKBONE = "google/vit-base-patch16-224-in21k"
PREPROCESSING = "published"
VARIANTS = {"vtab": "zip", "fgvc": "lists"}

PUBLISHED = (
    PublishedScores("linear probe", "arXiv 2203.12119", (68.93, 77.16, 26.84), 52.94, 57.64, 79.32),
    PublishedScores("full fine-tuning", "arXiv 2203.12119", (75.88, 83.36, 47.64), 65.57, 68.96, 88.54),
    PublishedScores("VPT-Shallow", "arXiv 2203.12119", (76.81, 79.66, 46.98), 64.85, 67.82, 84.62),
    PublishedScores("VPT-Deep", "arXiv 2203.12119", (78.48, 82.43, 54.98), 69.43, 71.96, 89.11),
    PublishedScores("VPT-Deep", "run again in arXiv 2503.06901", mean_of_groups=76.4),
    PublishedScores("VAPT", "arXiv 2501.18936", (81.43, 85.13, 59.34), 72.91, None, 89.58),
    PublishedScores("PRO-VPT", "arXiv 2503.06901", (83.3, 86.2, 64.5), None, 78.0, 91.7),
    PublishedScores("BPT-Deep", "arXiv 2506.22908", fgvc=91.72),
)
