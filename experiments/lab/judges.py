"""Rewards and preferences that are chosen by flags."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from experiments import records
from experiments.lab import models
from rlhf_jax import (
  data,
  flags,
  loop,
  rewards,
  user,
)


@dataclasses.dataclass(frozen=True)
class RewardOptions:
  """Judge of single responses; give path or name.

  Attributes:
    path: Workdir or Hugging Face folder of a reward model with the policy's tokenizer; several,
      separated by commas, form an ensemble.
    name: Python reward: a key of rlhf_jax.rewards.REWARDS, such as sentiment or gold, or your own
      `module:function`, such as my_rewards:brevity for my_rewards.py in the working directory or on
      PYTHONPATH: `(prompts, responses, rows) -> one number per response`, or for each response a
      list of `(end_character, score)` of its segments. The rows are those of the data, with all
      their columns.
    ensemble: Reduction of the scores of an ensemble: their mean, their minimum, or the mean minus
      `ensemble_coef` times their variance (`uwo`).
    ensemble_coef: Weight of the variance in `uwo`.
  """

  path: str = ""
  name: str = ""
  ensemble: Literal["mean", "min", "uwo"] = "mean"
  ensemble_coef: float = 0.5

  def __post_init__(self):
    if self.path and self.name:
      raise ValueError("name and path are both given; keep one")
    if self.name:
      self.function()

  def function(self) -> rewards.TextReward:
    """Returns the Python reward of `name`."""
    return user.resolve("name", self.name, rewards.REWARDS, ("prompts", "responses", "rows"))

  @property
  def paths(self) -> tuple[str, ...]:
    """Folders in `path`."""
    return tuple(part for part in self.path.split(",") if part)

  @property
  def is_given(self) -> bool:
    """True if the options name a reward."""
    return bool(self.path or self.name)

  def require(self) -> None:
    """Refuses options that name no reward."""
    if not self.is_given:
      known = ", ".join(sorted(rewards.REWARDS))
      raise flags.UsageError(f"no reward: give --reward.path=DIR or --reward.name, one of {known}")


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
  """Judge of pairs of responses; give path or name.

  Attributes:
    path: Workdir or Hugging Face folder of a preference model with the policy's tokenizer, or of a
      reward model, whose scores are compared by the Bradley-Terry model.
    name: Python judge: a key of rlhf_jax.rewards.PREFERENCES, such as panel, or your own
      `module:function`, such as my_judges:shorter for my_judges.py in the working directory or on
      PYTHONPATH: `(prompts, a, b, rows) -> one probability per pair` that `a` is preferred.
  """

  path: str = ""
  name: str = ""

  def __post_init__(self):
    if self.path and self.name:
      raise ValueError("name and path are both given; keep one")
    if self.name:
      self.function()

  def function(self) -> rewards.TextPreference:
    """Returns the Python judge of `name`."""
    return user.resolve("name", self.name, rewards.PREFERENCES, ("prompts", "a", "b", "rows"))

  @property
  def is_given(self) -> bool:
    """True if the options name a judge."""
    return bool(self.path or self.name)

  def require(self) -> None:
    """Refuses options that name no judge."""
    if not self.is_given:
      known = ", ".join(sorted(rewards.PREFERENCES))
      raise flags.UsageError(
        f"no preference: give --preference.path=DIR or --preference.name, one of {known}"
      )


class Named(NamedTuple):
  """Reward or preference with the flag that chose it, for messages."""

  name: str
  function: Callable[..., Any]

  def __call__(self, *args: Any) -> Any:
    return self.function(*args)


def name_of(judge: Any) -> str:
  """Returns the flag that chose a judge; of one that no flag chose, its kind."""
  return judge.name if isinstance(judge, Named) else "the judge"


@dataclasses.dataclass(frozen=True)
class JudgedConfig(loop.RunConfig):
  """Length of a run of a method that cannot do without a reward or a preference."""

  def require(self) -> None:
    """Refuses a config without a policy to start from, and one that names no judge, or several."""
    options = [getattr(self, name) for name in ("reward", "preference") if hasattr(self, name)]
    given = [of for of in options if of.is_given]
    if len(options) > 1 and len(given) != 1:
      raise flags.UsageError(
        "give --reward.path or --reward.name, or else --preference.path or name"
      )
    (given or options)[0].require()
    if not (self.init_from or getattr(self, "model").path):  # noqa: B009, every method has one.
      raise flags.UsageError(
        "--init_from is needed: a policy that nothing has trained samples noise"
      )


def _try(function: Callable[..., Any], prompts: data.Dataset, answers: int) -> None:
  """Finds a missing column or an unusable result before anything is compiled.

  Args:
    function: Reward or preference function of the texts.
    prompts: Prompts, to the first of which it gets empty responses.
    answers: Number of responses to each prompt that it judges.
  """
  rows = prompts.rows[:3]
  empty = [""] * len(rows)
  if not rows:  # Nothing is held out.
    return
  try:
    rewards.ask(function, [row["prompt_text"] for row in rows], *[empty] * answers, rows=rows)
  except user.ResultError as error:
    tried = "it was tried with empty responses, which a policy can give"
    raise user.ResultError(f"{error}; {tried}") from error


def open_preference(
  run: loop.Run,
  options: PreferenceOptions,
  model_options: models.ModelOptions,
  tokenizer: data.Tokenizer,
) -> Callable[[data.Dataset], rewards.PreferenceFn]:
  """Opens the judge of the options once and returns `(prompts) -> preference` of responses."""
  options.require()
  if options.path:
    model, params, label = models.open_scorer(run, options.path, model_options, tokenizer)
    if label == records.PREFERENCE:
      prefer = rewards.model_preference(model.apply, params, stop_ids=tokenizer.stop_ids)
    else:
      prefer = rewards.reward_preference(rewards.model_reward(model.apply, params))
    judge = Named(f"--preference.path={options.path}", prefer)
    return lambda prompts: judge  # A model reads the tokens of any prompts.
  function = options.function()

  def of_prompts(prompts: data.Dataset) -> rewards.PreferenceFn:
    _try(function, prompts, answers=2)
    prefer = rewards.text_preference(function, prompts.rows, tokenizer.batch_decode)
    return Named(f"--preference.name={options.name}", prefer)

  return of_prompts


def open_reward(
  run: loop.Run,
  options: RewardOptions,
  model_options: models.ModelOptions,
  tokenizer: data.Tokenizer,
) -> Callable[[data.Dataset], rewards.RewardFn]:
  """Opens the reward of the options once and returns `(prompts) -> reward` of responses."""
  options.require()
  if options.paths:
    scorers = [
      rewards.model_reward(model.apply, params)
      for model, params in (
        models.open_reward_model(run, path, model_options, tokenizer) for path in options.paths
      )
    ]
    score = scorers[0]
    if len(scorers) > 1:
      score = rewards.ensemble_reward(scorers, options.ensemble, options.ensemble_coef)
    judge = Named(f"--reward.path={options.path}", score)
    return lambda prompts: judge  # A reward model reads the tokens of any prompts.
  function = options.function()

  def of_prompts(prompts: data.Dataset) -> rewards.RewardFn:
    _try(function, prompts, answers=1)
    score = rewards.text_reward(function, prompts.rows, tokenizer.batch_decode)
    return Named(f"--reward.name={options.name}", score)

  return of_prompts


def gold_rewards(
  config: data.DataConfig, prompts: data.Dataset, tokenizer: data.Tokenizer
) -> dict[str, rewards.RewardFn]:
  """Returns the gold reward, if the prompts are those of the built-in task."""
  if config.path or config.tfds:
    return {}
  gold = rewards.text_reward(rewards.REWARDS["gold"], prompts.rows, tokenizer.batch_decode)
  return {"gold": gold}
