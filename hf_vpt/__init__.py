"""Visual prompt tuning for the Hugging Face ecosystem: VPT, VAPT, PRO-VPT and BPT as PEFT methods.

Importing this package registers the methods with PEFT. Do it in every program that loads one of its adapters:

    import hf_vpt
    model = PeftModel.from_pretrained(vit, "user/adapter")
"""

from . import versions  # noqa: F401, stands first: it refuses versions with which the rest would crash
from .attention.maps import SplitAttention, split_attentions
from .backbones import BACKBONES, BackboneRecord
from .hub.loading import load_image_classifier
from .registration import register_method
from .tuners import METHODS, TUNERS
from .tuners.bpt import BPTConfig, BPTModel, initialize_whitening
from .tuners.provpt import PROVPTConfig, PROVPTModel
from .tuners.vapt import VAPTConfig, VAPTModel
from .tuners.vpt import VPTConfig, VPTModel


__version__ = "0.1.0"

for _tuner in TUNERS.values():
    register_method(_tuner.config_cls, _tuner)

__all__ = [
    "BACKBONES",
    "METHODS",
    "BPTConfig",
    "BPTModel",
    "BackboneRecord",
    "PROVPTConfig",
    "PROVPTModel",
    "SplitAttention",
    "VAPTConfig",
    "VAPTModel",
    "VPTConfig",
    "VPTModel",
    "initialize_whitening",
    "load_image_classifier",
    "split_attentions",
]
