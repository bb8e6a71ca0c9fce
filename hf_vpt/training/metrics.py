"""Accuracy and mean class accuracy as `evaluate` metrics that need no network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


_INPUTS = """
Args:
    predictions: Predicted class of each image, an integer.
    references: True class of each image, an integer.
"""


class _ClassificationMetric(evaluate.Metric):
    """Base of metrics that compare one predicted with one true class for each image."""

    description: str
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=self.description, citation=self.citation, inputs_description=_INPUTS, features=features
        )


class Accuracy(_ClassificationMetric):
    """Share of images whose class is predicted correctly, between 0 and 1.

    Example:
        >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
        {'accuracy': 0.6666666666666666}
    """

    description = "Share of images whose class is predicted correctly."

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MeanClassAccuracy(_ClassificationMetric):
    """Accuracy computed for each class and averaged over classes, so that rare classes count as much as frequent ones.

    Classes without a single image among the references are left out of the mean.

    Example:
        >>> MeanClassAccuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
        {'mean_class_accuracy': 0.75}
    """

    description = "Accuracy of each class, averaged over the classes."

    def _compute(self, predictions, references) -> dict[str, float]:
        correct = np.asarray(predictions) == np.asarray(references)
        per_class = [correct[references == label].mean() for label in np.unique(references)]
        return {"mean_class_accuracy": float(np.mean(per_class))}


class ComputeMetrics:
    """The `compute_metrics` of a `Trainer` for image classification: accuracy and mean class accuracy of logits."""

    def __init__(self):
        # In memory: several processes that evaluate at once would wait for each other's files.
        self.metrics = evaluate.combine([Accuracy(keep_in_memory=True), MeanClassAccuracy(keep_in_memory=True)])

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score logits `(B, classes)` against labels `(B,)`."""
        logits = prediction.predictions
        # Some models return more than logits, which then come first.
        logits = logits[0] if isinstance(logits, tuple) else logits
        return self.metrics.compute(predictions=np.argmax(logits, axis=-1), references=prediction.label_ids)
