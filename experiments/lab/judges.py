"""Rewards and preferences that are chosen by flags."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax import (
  data,
  flags,
  loop,
  ranges,
  reporting,
  rewards,
  sharding,
  user,
)
from rlhf_jax.types import Rollout
from .. import records
from . import line_files, models

# Metrics reward/... that are no name of a reward.
_TAKEN = ("accuracy", "mean", "nonfinite", "shaped", "std", "tokens", "violations")


def _split(names: str) -> tuple[str, ...]:
  """Returns the names that commas separate."""
  return tuple(name for name in names.split(",") if name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteOptions:
  """Judge behind an OpenAI-compatible HTTP API, and what functions may take.

  Attributes:
    url: Address of a judge behind an OpenAI-compatible HTTP API, such as http://127.0.0.1:8000/v1.
      As a reward it gives a number from 0 to 10 for each response. As a preference it chooses A or
      B, asked in both orders. A reply without a number or a letter is asked for again, up to
      `retries` times at temperature 1, and else leaves its response out of the step. More than 10 %
      of a batch end the run.
    model: Name of the model at url.
    key_variable: Environment variable with the API key of url, such as OPENAI_API_KEY; empty sends
      no key. The key itself is never written or logged.
    request_timeout: Seconds that a request to url may take.
    retries: Number of further tries of a request to url that failed. They follow within seconds, or
      after 15 seconds, 30 and so on up to two minutes where the service limits requests, or after
      the time that it asks for.
    workers: Number of requests to url at the same time.
    function_timeout: Seconds that a call of a Python function of yours may take, for a batch; the
      run then ends as if the function had raised. 0 waits for ever.
  """

  url: str = ranges.rare("")
  model: str = ranges.rare("")
  key_variable: str = ranges.rare("")
  request_timeout: float = ranges.rare(60.0)
  retries: int = ranges.rare(3)
  workers: int = ranges.rare(8)
  function_timeout: float = ranges.rare(0.0)

  def __post_init__(self):
    ranges.check(
      self,
      positive=("request_timeout",),
      non_negative=("retries", "function_timeout"),
      at_least_one=("workers",),
    )
    if self.url:
      self.service()
    elif self.model or self.key_variable:
      raise ValueError("model and key_variable are those of url; give url")

  def service(self) -> rewards.Service:
    """Returns the judge at `url`."""
    return rewards.Service(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(rewards.Service)}
    )

  def _function(self, *names: Any) -> Callable[..., Any]:
    """Returns the function that `user.resolve(*names)` finds, which may take `function_timeout`."""
    return user.limited(user.resolve(*names), self.function_timeout)


@dataclasses.dataclass(frozen=True)
class RewardOptions(RemoteOptions):
  """Judge of single responses; give path, name, url or several of them.

  Attributes:
    path: Workdir or Hugging Face folder of a reward model: a classifier with one label, of any
      family that policies may have. One with another tokenizer or chat template than the policy's,
      and one that rlhf_jax has not trained, reads the text of prompt and response, rendered by its
      own. Several, separated by commas, form an ensemble unless there are weights.
    name: Python reward: a key of rlhf_jax.rewards.REWARDS, such as sentiment or gold, or your own
      `module:function`, such as my_rewards:brevity for my_rewards.py in the working directory or on
      PYTHONPATH: `(prompts, responses, rows) -> one number per response`, or for each response a
      list of `(end_character, score)` of its segments. The rows are those of the data, with all
      their columns. Several are separated by commas and added to that of path.
    weights: Weights of several rewards in their sum, first those of path, then those of name, then
      that of url. Without weights several paths form one ensemble, and each name is added with
      weight 1. Each reward is also a metric of its own, reward/NAME.
    constraints: Python constraints, separated by commas: keys of rlhf_jax.rewards.CONSTRAINTS, such
      as finished, or your own `module:function`, `(prompts, responses, rows) -> one bool per
      response`, True if it is satisfied. The metric reward/violations is the share of responses
      that violate any. CGPO, ReST and `--online.pick=constrained` learn from them; other methods
      only report them.
    ensemble: Reduction of the scores of an ensemble: their mean, their minimum (`min`), the mean
      minus `ensemble_coef` times their variance (`uwo`), or `ensemble_coef` times the mean plus the
      rest of 1 times the minimum (`nominal_min`). `worst_group` is MaxMin: the scores of the model
      with the lowest mean in the batch, or in all held-out responses of a policy. `min`, for each
      response, is another, lower objective.
    ensemble_coef: Weight of the variance in `uwo`, or of the mean in `nominal_min`.
  """

  path: str = ""
  name: str = ""
  weights: tuple[float, ...] = ()
  constraints: str = ""
  ensemble: str = "mean"
  ensemble_coef: float = ranges.rare(0.5)

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, one_of={"ensemble": rewards.ENSEMBLES})
    for field in ("path", "name", "constraints"):
      names = _split(getattr(self, field))
      if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{field} names {', '.join(twice)} twice")
    self.functions()
    self.verdicts()
    count = len(self.paths) + len(self.functions()) + bool(self.url)
    if self.weights and len(self.weights) != count:
      raise ValueError(
        f"weights has {len(self.weights)} numbers for {count} rewards: give one for each of path"
        " and then of name and url"
      )
    if self.constraints and not count:
      raise ValueError("constraints judge responses that a reward pays for; give path, name or url")
    if not all(map(math.isfinite, self.weights)):
      raise ValueError(f"weights must be finite, got {self.weights}")
    if self.ensemble == "mean":
      return
    if self.weights:
      raise ValueError(f"weights add up rewards, ensemble={self.ensemble} does not; keep one")
    if self.is_given and len(self.paths) < 2:
      raise ValueError(f"ensemble={self.ensemble} needs several folders in path")
    if self.ensemble == "nominal_min":
      ranges.check(self, fraction=("ensemble_coef",))

  def functions(self) -> dict[str, rewards.TextReward]:
    """Returns the Python rewards of `name` by their names."""
    arguments = ("prompts", "responses", "rows")
    names = _split(self.name)
    return {name: self._function("name", name, rewards.REWARDS, arguments) for name in names}

  def asked(self, ignored: Sequence[str]) -> dict[str, rewards.TextReward]:
    """Returns all rewards of texts by their names: those of `name`, and that of `url`.

    Args:
      ignored: Columns of rows that are no part of a prompt, `Dataset.ignored`.
    """
    remote = {"judge": rewards.remote_reward(self.service(), ignored)} if self.url else {}
    return self.functions() | remote

  @property
  def checks(self) -> data.Checks:
    """Checks of the rows that the rewards of `name` compare responses with, by their names."""
    return {
      name: rewards.REFERENCES[name] for name in _split(self.name) if name in rewards.REFERENCES
    }

  def verdicts(self) -> dict[str, rewards.TextConstraint]:
    """Returns the Python constraints of `constraints` by their names."""
    arguments = ("prompts", "responses", "rows")
    return {
      name: self._function("constraints", name, rewards.CONSTRAINTS, arguments)
      for name in _split(self.constraints)
    }

  @property
  def paths(self) -> tuple[str, ...]:
    """Folders in `path`."""
    return _split(self.path)

  @property
  def label(self) -> str:
    """Flags that choose the reward, for messages."""
    given = {"path": self.path, "name": self.name, "url": self.url}
    return " ".join(f"--reward.{flag}={value}" for flag, value in given.items() if value)

  @property
  def title(self) -> str:
    """Rewards and constraints, for the panel at the start of a run."""
    given = " + ".join(filter(None, (*self.paths, *_split(self.name), self.url)))
    return given + (f", constraints {self.constraints}" if self.constraints else "")

  @property
  def is_given(self) -> bool:
    """True if the options name a reward."""
    return bool(self.path or self.name or self.url)

  def require(self) -> None:
    """Refuses options that name no reward."""
    if not self.is_given:
      known = ", ".join(sorted(rewards.REWARDS))
      raise flags.UsageError(f"no reward: give --reward.path=DIR or --reward.name, one of {known}")


@dataclasses.dataclass(frozen=True)
class PreferenceOptions(RemoteOptions):
  """Judge of pairs of responses; give path, name or url.

  Attributes:
    path: Workdir or Hugging Face folder of a preference model with the policy's tokenizer, or of
      any reward model, whose scores are compared by the Bradley-Terry model.
    name: Python judge: a key of rlhf_jax.rewards.PREFERENCES, such as panel, or your own
      `module:function`, such as my_judges:shorter for my_judges.py in the working directory or on
      PYTHONPATH: `(prompts, a, b, rows) -> one probability per pair` that `a` is preferred.
  """

  path: str = ""
  name: str = ""

  def __post_init__(self):
    super().__post_init__()
    given = [name for name in ("name", "path", "url") if getattr(self, name)]
    if len(given) > 1:
      raise ValueError(f"{' and '.join(given)} are both given; keep one")
    if self.name:
      self.function()

  def function(self, ignored: Sequence[str] = ()) -> rewards.TextPreference:
    """Returns the judge of `url`, or the Python judge of `name`.

    Args:
      ignored: Columns of rows that are no part of a prompt, `Dataset.ignored`.
    """
    if self.url:
      return rewards.remote_preference(self.service(), ignored)
    return self._function("name", self.name, rewards.PREFERENCES, ("prompts", "a", "b", "rows"))

  @property
  def title(self) -> str:
    """Judge, for the panel at the start of a run."""
    return f"preferences of {self.path or self.name or self.url}"

  @property
  def is_given(self) -> bool:
    """True if the options name a judge."""
    return bool(self.path or self.name or self.url)

  def require(self) -> None:
    """Refuses options that name no judge."""
    if not self.is_given:
      known = ", ".join(sorted(rewards.PREFERENCES))
      raise flags.UsageError(
        f"no preference: give --preference.path=DIR or --preference.name, one of {known}"
      )


RewardOf = Callable[[data.Dataset], rewards.RewardFn]


class Named(NamedTuple):
  """Reward or preference with what is known of it.

  Attributes:
    name: Flag that chose it, for messages.
    function: Reward or preference.
    remote: True if a judge at an address is a part of it.
    groups: Names of the rewards of groups, of which it takes the one with the lowest mean and adds
      all others; empty without groups.
  """

  name: str
  function: Callable[..., Any]
  remote: bool = False
  groups: tuple[str, ...] = ()

  def __call__(self, *args: Any) -> Any:
    return self.function(*args)


def name_of(judge: Any) -> str:
  """Returns the flag that chose a judge; of one that no flag chose, its kind."""
  return judge.name if isinstance(judge, Named) else "the judge"


def worst_of(judge: Any, scores: Mapping[str, np.ndarray]) -> np.ndarray | None:
  """Returns a reward by the group that is the worst in all N responses; None without groups.

  A reward that is asked for them in batches chooses the group of each batch.

  Args:
    judge: Reward.
    scores: Name -> [N], each of the rewards in it.
  """
  groups = judge.groups if isinstance(judge, Named) else ()
  if not groups:
    return None
  of_groups = np.stack([scores[name] for name in groups], axis=1)
  worst = np.asarray(rewards.ENSEMBLES["worst_group"](jnp.asarray(of_groups), 0.0))
  return sum((x for name, x in scores.items() if name not in groups), worst)


def like(judge: Any, function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function that asks a judge, with what is known of the judge."""
  return judge._replace(function=function) if isinstance(judge, Named) else function


def watch(judge: Any) -> rewards.Watch:
  """Returns a check of the scores of a judge."""
  return rewards.Watch(name_of(judge), remote=isinstance(judge, Named) and judge.remote)


@dataclasses.dataclass(frozen=True)
class JudgedConfig(loop.RunConfig):
  """Length of a run of a method that cannot do without a reward or a preference."""

  @property
  def judge(self) -> RewardOptions | PreferenceOptions:
    """Options of the judge: the first that are given, or else the first."""
    options = [getattr(self, name) for name in ("reward", "preference") if hasattr(self, name)]
    return next((of for of in options if of.is_given), options[0])

  def require(self) -> None:
    """Refuses a config without a policy to start from, and one that names no judge, or several."""
    options = [getattr(self, name) for name in ("reward", "preference") if hasattr(self, name)]
    given = [of for of in options if of.is_given]
    if len(given) > 1:
      raise flags.UsageError(
        "give a reward or a preference, --reward.* or --preference.*, not both"
      )
    if len(options) > 1 and not given:
      known = ", ".join(sorted(rewards.REWARDS))
      raise flags.UsageError(
        f"no reward: give --reward.path=DIR or --reward.name, one of {known}; or a judge of"
        " pairs by --preference.path=DIR or --preference.name"
      )
    self.judge.require()
    if not (self.init_from or getattr(self, "model").path):  # noqa: B009, every method has one.
      raise flags.UsageError(
        "--init_from is needed: a policy that nothing has trained samples noise"
      )


def check_rows(checks: data.Checks, prompts: data.Dataset) -> None:
  """Refuses a row that a reward cannot read, of rows that were not checked as they were read.

  Raises:
    DataError: There is one.
  """
  for name in checks.keys() - {*prompts.checked}:
    for row in prompts.rows:
      try:
        checks[name](row)
      except data.DataError as error:
        raise data.DataError(
          f"--reward.name={name}: the row of the prompt {row['prompt_text'][:80]!r}: {error}"
        ) from error


def _try(
  function: Callable[..., Any],
  prompts: data.Dataset,
  answers: int = 1,
  ask: Callable[..., Any] = rewards.ask,
) -> None:
  """Finds a missing column or an unusable result before anything is compiled.

  Args:
    function: Reward, constraint or preference function of the texts.
    prompts: Prompts, to the first of which it gets empty responses.
    answers: Number of responses to each prompt that it judges.
    ask: `(function, prompts, *responses, rows)`, which calls the function.
  """
  rows = prompts.rows[:3]
  empty = [""] * len(rows)
  if not rows:  # Nothing is held out.
    return
  try:
    ask(function, [row["prompt_text"] for row in rows], *[empty] * answers, rows=rows)
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
    scorer, name = models.open_scorer(run, options.path, model_options, tokenizer), options.path
    if scorer.label == records.PREFERENCE:
      model, params, *_ = scorer
      prefer = rewards.model_preference(model.apply, params, stop_ids=tokenizer.stop_ids)
      judge = Named(f"--preference.path={name}", prefer)
      return lambda prompts: judge  # A model reads the tokens of any prompts.
    score_of = _reward_of(run, scorer, f"--preference.path={name}", model_options, tokenizer)
    return lambda prompts: Named(
      f"--preference.path={name}", rewards.reward_preference(score_of(prompts))
    )

  def of_prompts(prompts: data.Dataset) -> rewards.PreferenceFn:
    function = options.function(prompts.ignored)
    _try(function, prompts, answers=2)
    prefer = rewards.text_preference(function, prompts.rows, tokenizer.batch_decode)
    flag = f"url={options.url}" if options.url else f"name={options.name}"
    return Named(f"--preference.{flag}", prefer, bool(options.url))

  return of_prompts


def open_reward(
  run: loop.Run,
  options: RewardOptions,
  model_options: models.ModelOptions,
  tokenizer: data.Tokenizer,
) -> Callable[[data.Dataset], rewards.RewardFn]:
  """Opens the reward of the options once and returns `(prompts) -> reward` of responses."""
  options.require()
  models_of = _open_models(run, options, model_options, tokenizer)
  constraints = options.verdicts()

  def of_prompts(prompts: data.Dataset) -> rewards.RewardFn:
    check_rows(options.checks, prompts)
    scorers = {name: score_of(prompts) for name, score_of in models_of.items()}
    for name, function in options.asked(prompts.ignored).items():
      _try(function, prompts)
      scorers[name] = rewards.text_reward(function, prompts.rows, tokenizer.batch_decode)
    (score, *others) = scorers.values()
    if others or options.weights:
      score = rewards.weighted_reward(scorers, options.weights or [1.0] * len(scorers))
    for constraint in constraints.values():
      _try(constraint, prompts, ask=rewards.ask_constraint)
    if constraints:
      verdicts = list(constraints.values())
      score = rewards.constrained_reward(score, verdicts, prompts.rows, tokenizer.batch_decode)
    return Named(options.label, score, bool(options.url), _groups(options))

  return of_prompts


def _groups(options: RewardOptions) -> tuple[str, ...]:
  """Names of the models of groups; empty if the models are none."""
  count = len(options.paths) if options.ensemble == "worst_group" else 0
  return tuple(f"group_{k}" for k in range(count))


def _open_models(
  run: loop.Run,
  options: RewardOptions,
  model_options: models.ModelOptions,
  tokenizer: data.Tokenizer,
) -> dict[str, RewardOf]:
  """Opens the reward models of the options by name; as an ensemble they are one."""
  if not options.paths:
    return {}
  names: Sequence[str] = line_files.short_names("reward.path", options.paths)
  others = [*_split(options.name), *(["judge"] if options.url else [])]
  if taken := sorted({*names} & {*_TAKEN, *others}):
    raise flags.UsageError(
      f"--reward.path: reward/{taken[0]} is another metric; give the folder {taken[0]} another name"
    )
  names = _groups(options) or names
  opened = {
    name: _reward_of(
      run,
      models.open_reward_model(run, path, model_options, tokenizer),
      f"--reward.path={path}",
      model_options,
      tokenizer,
    )
    for name, path in zip(names, options.paths, strict=True)
  }
  if len(opened) == 1 or options.weights:
    return opened

  def ensemble(prompts: data.Dataset) -> rewards.RewardFn:
    scorers = {name: score_of(prompts) for name, score_of in opened.items()}
    return rewards.ensemble_reward(scorers, options.ensemble, options.ensemble_coef)

  return {"ensemble": ensemble}


def _reward_of(
  run: loop.Run,
  scorer: models.Scorer,
  flag: str,
  model_options: models.ModelOptions,
  tokenizer: data.Tokenizer,
) -> RewardOf:
  """Returns `(prompts) -> reward` of an opened reward model.

  Args:
    run: Opened run.
    scorer: Reward model.
    flag: Flag that chose it, for messages.
    model_options: Options of the models of the run.
    tokenizer: Tokenizer of the policy.
  """
  model, params, _, read_by = scorer
  if read_by is None:
    score = rewards.model_reward(model.apply, params)
    return lambda prompts: score  # It reads the tokens of any prompts.
  reporting.note(
    f"{flag} has another tokenizer or chat template than the policy, or comes from elsewhere:"
    " responses are decoded, and rendered and encoded with its own"
  )
  config = model.config
  is_limited = config.positions == "learned" or not model_options.extrapolate

  def of_prompts(prompts: data.Dataset) -> rewards.RewardFn:
    try:
      given = data.given_prompts(
        prompts.rows, prompts.ignored, prefer_messages=read_by.has_chat_template
      )
      for prompt in given:
        if not isinstance(prompt, str):  # Turns of tools, which its template may leave out.
          read_by.require_prompt(prompt)
      return rewards.rendered_reward(
        model.apply,
        params,
        given,
        tokenizer.batch_decode,
        read_by.encode_texts,
        place=lambda rows: sharding.place_batch(rows, run.mesh),
        limit=config.max_length if is_limited else None,
      )
    except data.DataError as error:
      raise data.DataError(f"{flag}: {error}") from error

  return of_prompts


class Scores(NamedTuple):
  """Scores of the samples of an iteration, and the judge of held-out responses.

  Attributes:
    score_of: `(prompts) -> reward` of samples, in the order of a batch.
    reward_of: `(prompts) -> reward` of any responses; None with a preference.
    prefer_of: `(prompts) -> preference`; None with a reward.
  """

  score_of: Callable[[data.Dataset], rewards.RewardFn]
  reward_of: Callable[[data.Dataset], rewards.RewardFn] | None
  prefer_of: Callable[[data.Dataset], rewards.PreferenceFn] | None


def open_scores(
  run: loop.Run,
  config: Any,
  tokenizer: data.Tokenizer,
  anchors: Callable[..., Any] | None = None,
) -> Scores:
  """Opens the reward of a config, or the preference that it gives in place of one.

  With a preference the samples of a prompt meet each other. A single sample meets its anchor.

  Args:
    run: Opened run.
    config: Config with `reward`, `preference`, `model` and `sampling`.
    tokenizer: Tokenizer of the policy.
    anchors: `(rollout, prompt_ids) -> rollout` of other responses; see `rewards.anchored_reward`.
  """
  if not config.preference.is_given:
    reward_of = open_reward(run, config.reward, config.model, tokenizer)
    return Scores(reward_of, reward_of, None)
  prefer_of = open_preference(run, config.preference, config.model, tokenizer)
  samples = config.sampling.samples_per_prompt

  def score_of(prompts: data.Dataset) -> rewards.RewardFn:
    prefer = prefer_of(prompts)
    if samples > 1 or anchors is None:
      meet = prefer.function if isinstance(prefer, Named) else prefer
      return like(prefer, rewards.tournament_reward(meet, samples, watch(prefer)))
    return like(prefer, rewards.anchored_reward(prefer, anchors))

  return Scores(score_of, None, prefer_of)


def gold_rewards(
  config: data.DataConfig, prompts: data.Dataset, tokenizer: data.Tokenizer
) -> dict[str, rewards.RewardFn]:
  """Returns the gold reward, if the prompts are those of the built-in task."""
  if data.is_given(config):
    return {}
  gold = rewards.text_reward(rewards.REWARDS["gold"], prompts.rows, tokenizer.batch_decode)
  return {"gold": gold}


def mean_rewards(
  fns: Mapping[str, rewards.RewardFn], rollout: Rollout, prompt_ids: np.ndarray
) -> dict[str, float]:
  """Returns the mean of each of several rewards of responses, as NAME_reward/mean."""
  return {
    f"{name}_reward/mean": float(np.mean(rewards.total(fn(rollout, prompt_ids))))
    for name, fn in fns.items()
  }
