"""Training with Trainer and Accelerate: settings, models, metrics, and a whole run in one call."""

from ..data.arguments import DataArguments
from .arguments import BASELINES, ModelArguments, TrainingArguments
from .comparison import check_comparable
from .directions import DirectionalSteps, LengthFloor
from .ema import ExponentialMovingAverage
from .experiment import build_trainer, train_classifier
from .metrics import Accuracy, ComputeMetrics, MeanClassAccuracy
from .models import (
    count_trained_parameters,
    load_classifier,
    load_image_processor,
    load_label_names,
    prepare_for_training,
)
from .optimizer import directions_of
from .parsing import Settings, parse_arguments
from .prefix import PrefixCaching
from .relocation import RelocationCallback
from .shared import SharedLoader
from .steps import StepRecorder
from .trainer import ClassificationLoss, ImageClassificationTrainer
from .trouble import PlateauWarning


__all__ = [
    "BASELINES",
    "Accuracy",
    "ClassificationLoss",
    "ComputeMetrics",
    "DataArguments",
    "DirectionalSteps",
    "ExponentialMovingAverage",
    "ImageClassificationTrainer",
    "LengthFloor",
    "MeanClassAccuracy",
    "ModelArguments",
    "PlateauWarning",
    "PrefixCaching",
    "RelocationCallback",
    "Settings",
    "SharedLoader",
    "StepRecorder",
    "TrainingArguments",
    "build_trainer",
    "check_comparable",
    "count_trained_parameters",
    "directions_of",
    "load_classifier",
    "load_image_processor",
    "load_label_names",
    "parse_arguments",
    "prepare_for_training",
    "train_classifier",
]
