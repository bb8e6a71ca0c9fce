"""A web service for images: one frozen backbone, an adapter for each task (`pip install "hf_vpt[serve]"`)."""

from .app import create_app, serve
from .arguments import ServingArguments, parse_serving
from .classifier import Classifier, load_classifier
from .engine import Batcher
from .load import LoadArguments, LoadReport, LoadTest


__all__ = [
    "Batcher",
    "Classifier",
    "LoadArguments",
    "LoadReport",
    "LoadTest",
    "ServingArguments",
    "create_app",
    "load_classifier",
    "parse_serving",
    "serve",
]
