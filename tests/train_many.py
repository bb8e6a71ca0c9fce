"""Trains several cases one after the other, in one process or in each of those that Accelerate has started.

    accelerate launch --config_file FILE tests/train_many.py CASES.json [--emulate_gpus]

`CASES.json` holds the words of a command line for each case. A launch takes longer than a run of a tiny model.
"""

import json
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import set_seed

from hf_vpt.training import experiment, parse_arguments, train_classifier


def train_many(cases):
    """Train each case, and return what `train_classifier` does for each."""
    prepare = experiment.prepare_for_training

    def prepare_seeded(*args, **kwargs):
        # How many random numbers a backbone takes to load depends on whether it is sharded while loading.
        set_seed(0)
        return prepare(*args, **kwargs)

    experiment.prepare_for_training = prepare_seeded
    try:
        return {name: train_classifier(parse_arguments(words)) for name, words in cases.items()}
    finally:
        experiment.prepare_for_training = prepare


def let_fsdp_run_on_a_cpu():
    """Make Accelerate, which passes over FSDP on a CPU without a word, treat gloo processes as GPUs."""
    original = AcceleratorState.__init__

    def initialize(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize


if __name__ == "__main__":
    if "--emulate_gpus" in sys.argv:
        let_fsdp_run_on_a_cpu()
    with open(sys.argv[1], encoding="utf-8") as stream:
        results = train_many(json.load(stream))
    if PartialState().is_main_process:
        with open(sys.argv[1] + ".results", "w", encoding="utf-8") as stream:
            json.dump({**results, "kind": str(AcceleratorState().distributed_type)}, stream)
    torch.distributed.destroy_process_group()
