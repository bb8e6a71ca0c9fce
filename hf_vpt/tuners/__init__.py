"""The prompt methods, one folder each; `METHODS` is what everything that goes over all of them reads."""

from .bpt import BPTConfig, BPTModel
from .provpt import PROVPTConfig, PROVPTModel
from .vapt import VAPTConfig, VAPTModel
from .vpt import VPTConfig, VPTModel


# Config of each method by the name that users write in YAML files and on the command line.
METHODS = {"vpt": VPTConfig, "vapt": VAPTConfig, "provpt": PROVPTConfig, "bpt": BPTConfig}
TUNERS = {"vpt": VPTModel, "vapt": VAPTModel, "provpt": PROVPTModel, "bpt": BPTModel}


__all__ = ["METHODS", "TUNERS"]
