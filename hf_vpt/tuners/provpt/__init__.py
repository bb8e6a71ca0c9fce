"""PRO-VPT: prompts that move to the blocks that need them (arXiv 2503.06901)."""

from .allocation import AllocationPolicy, PPOAllocation, ThompsonAllocation, policy_state
from .config import PROVPTConfig
from .model import PROVPTModel
from .prompts import PROVPTPrompts
from .relocation import PromptScores, Relocation, Relocator, ScoreRecorder


__all__ = [
    "AllocationPolicy",
    "PPOAllocation",
    "PROVPTConfig",
    "PROVPTModel",
    "PROVPTPrompts",
    "PromptScores",
    "Relocation",
    "Relocator",
    "ScoreRecorder",
    "ThompsonAllocation",
    "policy_state",
]
