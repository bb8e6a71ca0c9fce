"""The prompt methods, one folder each; `METHODS` is what everything that goes over all of them reads."""

from .bpt import BPTModel
from .provpt import PROVPTModel
from .vapt import VAPTModel
from .vpt import VPTModel


# Tuner of each method by the name that users write in YAML files and on the command line.
TUNERS = {"vpt": VPTModel, "vapt": VAPTModel, "provpt": PROVPTModel, "bpt": BPTModel}
METHODS = {name: tuner.config_cls for name, tuner in TUNERS.items()}


__all__ = ["METHODS", "TUNERS"]
