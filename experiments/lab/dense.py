"""Rewards of tokens by a policy that DPO has trained, beside the reward of a script."""

import dataclasses
from collections.abc import Callable

import numpy as np

from rlhf_jax import data, ranges, rewards
from rlhf_jax.algorithms import reading
from rlhf_jax.types import Rollout
from . import judges, models
from .workbench import Workbench


@dataclasses.dataclass(frozen=True)
class DenseOptions:
  """Dense rewards (RTO): log-ratios of a policy of DPO to its reference.

  Attributes:
    path: Workdir of a run of `dpo` that started from the same policy as this run, or the folder of
      its model; empty adds no rewards of tokens.
    scale: Reward per nat of the log-ratio.
    clip: Bound on the absolute reward of a token; 0 does not clip.
  """

  path: str = ""
  scale: float = ranges.rare(0.05)
  clip: float = ranges.rare(0.05)

  def __post_init__(self):
    ranges.check(self, positive=("scale",), non_negative=("clip",))

  def _read(self, bench: Workbench) -> reading.Read:
    return reading.make_read(bench.model.apply, bench.config.sampling.temperature)

  @property
  def _sizes(self) -> dict[str, float]:
    return {"scale": self.scale, "clip": self.clip or np.inf}

  def scorer(self, bench: Workbench) -> rewards.DenseScorer | None:
    """Returns the program that scores tokens; None without a path."""
    return rewards.make_dense_scorer(self._read(bench), **self._sizes) if self.path else None

  def added_to(
    self, reward_of: Callable[[data.Dataset], rewards.RewardFn], bench: Workbench
  ) -> Callable[[data.Dataset], rewards.RewardFn]:
    """Opens the policy of DPO and returns `(prompts) -> reward` with rewards of tokens."""
    if not self.path:
      return reward_of
    given = bench.run, self.path, bench.config.model, bench.tokenizer, bench.start
    params = models.open_policy(*given, "dense.path")
    dense = rewards.dense_reward(self._read(bench), params, bench.start, **self._sizes)

    def of_prompts(prompts: data.Dataset) -> rewards.RewardFn:
      score = reward_of(prompts)

      def both(rollout: Rollout, prompt_ids: np.ndarray) -> rewards.Parts:
        given = rewards.parts_of(score(rollout, prompt_ids))
        return rewards.weighted({"score": given, "dense": dense(rollout, prompt_ids)}, [1, 1])

      return judges.like(score, both)

    return of_prompts
