"""PRO-VPT: prompts that move to the blocks that need them (arXiv 2503.06901)."""

from .allocation import AllocationPolicy, PPOAllocation, RandomAllocation, ThompsonAllocation, policy_state
from .config import PROVPTConfig
from .model import PROVPTModel
from .prompts import PROVPTPrompts
from .relocation import Relocation, Relocator
from .scores import PromptScores, ScoreRecorder


__all__ = [
    "AllocationPolicy",
    "PPOAllocation",
    "PROVPTConfig",
    "PROVPTModel",
    "PROVPTPrompts",
    "PromptScores",
    "RandomAllocation",
    "Relocation",
    "Relocator",
    "ScoreRecorder",
    "ThompsonAllocation",
    "policy_state",
]
