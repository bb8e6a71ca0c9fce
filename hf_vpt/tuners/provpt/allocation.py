"""Policies that name the block for a prompt that moves. Plain objects: no model, no prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


class AllocationPolicy(Protocol):
    """Names a block, is told later how good that was.

    A policy with a true attribute `chooses_prompt` also says which prompt leaves, by `leave(number of prompts)`, in
    the place of the scores, and none of these need be above the threshold then.
    """

    def act(self, state: torch.Tensor, allowed: Sequence[bool] | None = None) -> int:
        """The block for the prompt.

        Args:
            state: The policy state `(3·L,)`.
            allowed: Whether the prompt fits into each of the L blocks; None for all.
        """

    def observe(self, reward: float) -> float | None:
        """Takes the reward of the last action; returns the policy's loss where it learned from it."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next action depends on: numbers and tensors, in dictionaries and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""


def policy_state(scores: torch.Tensor, blocks: torch.Tensor, num_blocks: int, leaving: int) -> torch.Tensor:
    """What a policy sees (PRO-VPT, arXiv 2503.06901, published code).

    Args:
        scores: Idleness score of each of the K prompts, `(K,)`.
        blocks: Block of each prompt, `(K,)`, from 0 to L − 1.
        num_blocks: Number L of blocks in the pool.
        leaving: The prompt that leaves its block.

    Returns:
        `(3·L,)` in float64: the sums of the scores in each block, standardised; the share of each block in the
        prompts that stay; one-hot of the block that is left.
    """
    sums = torch.zeros(num_blocks, dtype=torch.float64).index_add_(0, blocks, scores.double())
    counts = torch.bincount(blocks, minlength=num_blocks).double()
    left = nn.functional.one_hot(blocks[leaving], num_blocks).double()
    staying = counts - left
    standardised = (sums - sums.mean()) / (sums.std(correction=0) + 1e-8)
    return torch.cat([standardised, staying / staying.sum().clamp(min=1), left])


class PPOAllocation:
    """Learns by proximal policy optimisation which block should get a prompt.

    Actor and critic are MLPs 3L–64–64–(L softmax | 1) with tanh. After every `horizon` rewards both learn for `epochs`
    steps from −min(ρA, clip(ρ, 1 − ε, 1 + ε)·A) + value_coef·(V − R)² − entropy_coef·entropy, with returns R
    standardised over the buffer and advantages A = R − V_old (PRO-VPT, arXiv 2503.06901; published settings).

    Args:
        num_blocks: Number L of blocks.
        seed: Seed of the initial weights and of the draws.
        horizon: Rewards between two updates, at least 2.
        gamma: Discount of later rewards, in [0, 1].
        epochs: Steps of one update.
        clip_epsilon: ε.
        actor_lr: Learning rate of Adam for the actor.
        critic_lr: Learning rate of Adam for the critic.
        value_coef: Weight of the critic's error.
        entropy_coef: Weight of the entropy.
    """

    def __init__(
        self,
        num_blocks: int,
        seed: int = 0,
        horizon: int = 2,
        gamma: float = 1.0,
        epochs: int = 60,
        clip_epsilon: float = 0.2,
        actor_lr: float = 3e-4,
        critic_lr: float = 1e-3,
        value_coef: float = 0.5,
        entropy_coef: float = 0.01,
    ):
        if horizon < 2 or not 0 <= gamma <= 1 or clip_epsilon <= 0:
            raise ValueError(
                f"horizon is {horizon}, gamma {gamma}, clip_epsilon {clip_epsilon}. Returns are standardised over the "
                "buffer, so horizon must be at least 2; gamma must lie in [0, 1] and clip_epsilon above 0."
            )
        self.horizon, self.gamma, self.epochs, self.clip_epsilon = horizon, gamma, epochs, clip_epsilon
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = _mlp(3 * num_blocks, num_blocks)
            self.critic = _mlp(3 * num_blocks, 1)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.actor.parameters(), "lr": actor_lr},
                {"params": self.critic.parameters(), "lr": critic_lr},
            ]
        )
        self.num_blocks = num_blocks
        self.steps: list[tuple[torch.Tensor, int, float, float, torch.Tensor]] = []
        self.rewards: list[float] = []

    @torch.no_grad()
    def act(self, state: torch.Tensor, allowed: Sequence[bool] | None = None) -> int:
        state = state.float()
        barrier = self._barrier(allowed)
        log_probs = (self.actor(state) + barrier).log_softmax(dim=-1)
        action = int(torch.multinomial(log_probs.exp(), 1, generator=self.generator))
        self.steps.append((state, action, log_probs[action].item(), self.critic(state).item(), barrier))
        return action

    def _barrier(self, allowed: Sequence[bool] | None) -> torch.Tensor:
        """What to add to the logits of the L blocks. Finite, so that the entropy is."""
        forbidden = [not block for block in (allowed or [True] * self.num_blocks)]
        return torch.tensor(forbidden).float() * -1e9

    def observe(self, reward: float) -> float | None:
        self.rewards.append(reward)
        if len(self.rewards) < self.horizon:
            return None
        states, actions, log_probs, values, barriers = zip(*self.steps, strict=True)
        loss = self.update(
            torch.stack(states),
            torch.tensor(actions),
            torch.tensor(log_probs),
            torch.tensor(values),
            self.rewards,
            torch.stack(barriers),
        )
        self.steps, self.rewards = [], []
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": [list(step) for step in self.steps],
            "rewards": list(self.rewards),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.steps = [tuple(step) for step in state["steps"]]
        self.rewards = list(state["rewards"])

    def update(
        self,
        states: torch.Tensor,
        actions: torch.Tensor,
        old_log_probs: torch.Tensor,
        old_values: torch.Tensor,
        rewards: list[float] | torch.Tensor,
        barriers: torch.Tensor | float = 0.0,
    ) -> float:
        """Learns from S steps.

        Args:
            states: `(S, 3·L)`.
            actions: Blocks that were named, `(S,)`.
            old_log_probs: Their log-probabilities at that time, `(S,)`.
            old_values: What the critic expected then, `(S,)`.
            rewards: What followed, S numbers.
            barriers: Added to the actor's logits: 0, or a large negative number for a block that was not allowed,
                `(S, L)`.

        Returns:
            The loss, averaged over the steps and the epochs.
        """
        returns, total = [], 0.0
        for reward in reversed(torch.as_tensor(rewards).tolist()):
            total = reward + self.gamma * total
            returns.insert(0, total)
        returns = torch.tensor(returns)
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        advantages = returns - old_values
        losses = []
        with torch.enable_grad():  # relocation runs between epochs, perhaps under no_grad
            for _ in range(self.epochs):
                log_probs = (self.actor(states) + barriers).log_softmax(dim=-1)
                ratios = (log_probs.gather(1, actions[:, None])[:, 0] - old_log_probs).exp()
                clipped = ratios.clamp(1 - self.clip_epsilon, 1 + self.clip_epsilon)
                entropy = -(log_probs.exp() * log_probs).sum(dim=1)
                value_loss = nn.functional.mse_loss(self.critic(states)[:, 0], returns)
                policy_loss = -torch.minimum(ratios * advantages, clipped * advantages)
                loss = (policy_loss + self.value_coef * value_loss - self.entropy_coef * entropy).mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
        return sum(losses) / len(losses)


class ThompsonAllocation:
    """Names the block with the largest draw from its Beta(successes, failures) (PRO-VPT, arXiv 2503.06901).

    A move is a success if its reward is not negative.

    Args:
        num_blocks: Number L of blocks.
        seed: Seed of the draws.
    """

    def __init__(self, num_blocks: int, seed: int = 0):
        self.successes = np.ones(num_blocks)
        self.failures = np.ones(num_blocks)
        self.generator = np.random.default_rng(seed)
        self.action: int | None = None

    def act(self, state: torch.Tensor, allowed: Sequence[bool] | None = None) -> int:
        draws = self.generator.beta(self.successes, self.failures)
        self.action = int(draws.argmax() if allowed is None else np.where(allowed, draws, -1.0).argmax())
        return self.action

    def observe(self, reward: float) -> None:
        (self.successes if reward >= 0 else self.failures)[self.action] += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "successes": self.successes.tolist(),
            "failures": self.failures.tolist(),
            "action": self.action,
            "generator": self.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.successes, self.failures = np.array(state["successes"]), np.array(state["failures"])
        self.action = state["action"]
        self.generator.bit_generator.state = state["generator"]


class RandomAllocation:
    """Lets any prompt leave for any block, whatever the scores: what learned moves have to beat.

    Args:
        num_blocks: Number L of blocks.
        seed: Seed of the draws.
    """

    # The scores do not say which prompt leaves, and none need be positive.
    chooses_prompt = True

    def __init__(self, num_blocks: int, seed: int = 0):
        self.num_blocks = num_blocks
        self.generator = np.random.default_rng(seed)

    def leave(self, num_prompts: int) -> int:
        """The prompt that leaves, of the K prompts of the pool."""
        return int(self.generator.integers(num_prompts))

    def act(self, state: torch.Tensor, allowed: Sequence[bool] | None = None) -> int:
        return int(self.generator.choice(np.flatnonzero(allowed or [True] * self.num_blocks)))

    def observe(self, reward: float) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state["generator"]


def _mlp(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
