"""Deployment: a classifier with its prompts in one file, which runs without this package.

`export_onnx` is for onnxruntime and others, `export_program` for PyTorch alone.
"""

from .formats import export_onnx, export_program


__all__ = ["export_onnx", "export_program"]
