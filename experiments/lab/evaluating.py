"""Evaluation on held-out rows and prompts."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import (
  data,
  evaluation,
  generation,
  loop,
  reporting,
  rewards,
  sharding,
)
from rlhf_jax.algorithms import reading, reward_model, sft
from rlhf_jax.losses import masked
from rlhf_jax.models import Model
from rlhf_jax.types import Params, RankingBatch, Rollout
from . import judges, models, training

T = TypeVar("T")


def measure_rows(
  run: loop.Run,
  dataset: data.Dataset,
  batch_size: int,
  pad_id: int,
  measure: Callable[[Any], Any],
  columns: np.ndarray | None = None,
  show: str = "",
  only: np.ndarray | None = None,
) -> Any:
  """Runs `measure` on every batch of a data set and concatenates its trees of [B, ...] arrays.

  Rows that only fill the last batch are left out, and so are those not in the indices `only`.

  With `show` a progress bar of that name is shown, which must not be inside another bar.
  """
  collected = []
  batches = data.eval_batches(dataset, batch_size, pad_id, columns=columns, only=only)
  total = -(-(len(dataset.examples) if only is None else len(only)) // batch_size)
  with contextlib.ExitStack() as stack:
    bar = None
    if show:
      bar = stack.enter_context(reporting.Progress(total, description=show, tenths=False))
    for step, (batch, valid) in enumerate(batches, start=1):
      values = sharding.to_host(measure(sharding.place_batch(batch, run.mesh)))
      collected.append(jax.tree.map(lambda x, on=valid: x[on], values))
      if bar is not None:
        bar.update(step)
  return jax.tree.map(lambda *parts: np.concatenate(parts), *collected)


def compared(dataset: data.Dataset, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Turns values [rows, K] of responses into those of the better and the worse of each pair.

  Returns:
    Values [rows, M, 2], and [rows, M] bool, False where there is no such pair.
  """
  ranks = np.zeros(values.shape, np.int32)
  real = np.zeros(values.shape, bool)
  for row, is_real, example in zip(ranks, real, dataset.examples, strict=True):
    order = example.get("ranks", np.arange(2))  # A pair has its better response first.
    row[: len(order)], is_real[: len(order)] = order, True
  batch = RankingBatch(jnp.zeros(0), jnp.zeros(0), jnp.asarray(ranks), jnp.asarray(real))
  return jax.device_get(reward_model.ordered_pairs(jnp.asarray(values), batch))


def compared_lengths(dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
  """Lengths of the better and the worse response of each pair, in tokens; see `compared`."""
  lengths = np.zeros([len(dataset.examples), dataset.width], np.float32)
  for row, example in zip(lengths, dataset.examples, strict=True):
    responses = data.responses_of(example)
    row[: len(responses)] = [len(response) for response in responses]
  return compared(dataset, lengths)


def mean_score(dataset: data.Dataset, scores: np.ndarray) -> float:
  """Mean of the scores [rows, K] of all responses, each of which counts the same."""
  counts = [len(data.responses_of(example)) for example in dataset.examples]
  real = np.arange(scores.shape[1]) < np.asarray(counts)[:, None]
  return float(np.mean(scores[real], dtype=np.float64))


def length_baseline(dataset: data.Dataset) -> dict[str, float]:
  """Accuracy of preferring the longer response on held-out pairs; empty without rows."""
  if not dataset.examples:
    return {}
  by_length = reward_model.pair_metrics(*compared_lengths(dataset))
  return {"eval/length_baseline": float(by_length["reward/accuracy"])}


def once_per_step(measure: Callable[[Any, int], T]) -> Callable[[Any, int], T]:
  """Caches the last result of `measure(state, step)`, which the end of a run needs twice."""
  last: dict[int, T] = {}

  def measure_once(state: Any, step: int) -> T:
    if step not in last:
      last.clear()
      last[step] = measure(state, step)
    return last[step]

  return measure_once


def as_prompts(dataset: data.Dataset, limit: int) -> data.Dataset:
  """Returns the first prompts of any data set, each once, to sample responses to."""
  first = {row["prompt_text"]: i for i, row in reversed(list(enumerate(dataset.rows)))}
  kept = sorted(first.values())[:limit]
  examples, rows = [dataset.examples[i] for i in kept], [dataset.rows[i] for i in kept]
  longest = max((len(example["prompt"]) for example in examples), default=1)
  return dataset._replace(kind="prompts", examples=examples, rows=rows, padded_length=longest)


class Samples(NamedTuple):
  """One response of a policy to every held-out prompt.

  Attributes:
    prompts: [B] texts.
    responses: [B] texts.
    rewards: Rewards [B] by name, NaN where they are unusable.
    kl: [B] sum of log pi - log ref over each response, in nats.
    lengths: [B] lengths of the responses in tokens.
    ended: [B] bool, True on responses that ended in a stop token.
    satisfied: [B] bool, True on responses that violate no constraint; None without constraints.
    by_policy: Names of the rewards that are chosen for each policy, as that of its worst group:
      those of two policies are not compared response by response.
  """

  prompts: list[str]
  responses: list[str]
  rewards: dict[str, np.ndarray]
  kl: np.ndarray
  lengths: np.ndarray
  ended: np.ndarray
  satisfied: np.ndarray | None = None
  by_policy: tuple[str, ...] = ()

  @property
  def violations(self) -> dict[str, float]:
    """Share of the responses that violate a constraint; empty without constraints."""
    return {} if self.satisfied is None else {"reward/violations": 1 - float(self.satisfied.mean())}


def sequence_kl(model: Model, temperature: float) -> Callable[..., jax.Array]:
  """Builds jitted `(ref_params, rollout) -> [B]`: log pi - log ref summed over each response."""
  read_ref = reading.make_read(model.apply, temperature)

  @jax.jit
  def kl(ref_params: Params, rollout: Rollout) -> jax.Array:
    ref = read_ref(ref_params, rollout).logprobs
    mask = rollout.response_mask[:, -ref.shape[1] :]
    return masked.masked_sum(rollout.logprobs - ref, mask, axis=1)

  return kl


class Answered(NamedTuple):
  """Responses of a policy to a batch of held-out prompts.

  Attributes:
    rollout: B responses, on the mesh.
    prompt_ids: [B] int32 on the host, the rows of the prompts.
    valid: [B] bool, False on rows that only fill the last batch.
  """

  rollout: Rollout
  prompt_ids: np.ndarray
  valid: np.ndarray


def heldout_responder(
  run: loop.Run,
  model: Model,
  dataset: data.Dataset,
  tokenizer: data.Tokenizer,
  config: generation.SamplingConfig,
  batch_size: int = 128,
) -> Callable[[Params, int], Iterator[Answered]]:
  """Builds `respond(params, index)`: one response of a policy per held-out prompt, in batches.

  Calls of one index share their random numbers, so that two checkpoints of a policy differ by
  little else than their params. Those of different indices are independent: win rates compare a
  policy with a baseline of another index. It is compiled once.

  Args:
    run: Opened run, with the mesh and the key.
    model: Architecture of the policies.
    dataset: Held-out prompts.
    tokenizer: Tokenizer of the policies.
    config: Settings of the sampler.
    batch_size: Prompts per call of the model.
  """
  config = dataclasses.replace(config, samples_per_prompt=1)
  generate = models.make_sampler(model, tokenizer, config)
  reshard = sharding.make_reshard(run.mesh, model.config.dtype)
  batch_size = heldout_batch_size(run, dataset, batch_size)

  def respond(params: Params, index: int) -> Iterator[Answered]:
    key = heldout_key(run, index)
    params = reshard(params)
    for prompts, valid in data.eval_batches(dataset, batch_size, tokenizer.pad_id):
      placed = sharding.place_batch(prompts, run.mesh)
      rollout = generate(params, placed.tokens, placed.mask, placed.prompt_id, key)
      yield Answered(rollout, prompts.prompt_id, valid)

  return respond


def heldout_scorer(
  model: Model,
  dataset: data.Dataset,
  tokenizer: data.Tokenizer,
  config: generation.SamplingConfig,
  *,
  reward_fns: Mapping[str, rewards.RewardFn],
  ref_params: Params | None = None,
) -> Callable[[Iterable[Answered]], Samples]:
  """Builds the function that scores the responses of a policy to all held-out prompts.

  Args:
    model: Architecture of the reference.
    dataset: Held-out prompts.
    tokenizer: Tokenizer of the policies.
    config: Settings of the sampler.
    reward_fns: Rewards to compute, by name.
    ref_params: Reference of the KL; None makes the KL 0.
  """
  stops = models.stops(tokenizer, config)
  kl_fn = sequence_kl(model, config.temperature)

  def score(answers: Iterable[Answered]) -> Samples:
    parts: list[dict[str, np.ndarray]] = []
    responses: list[str] = []
    names: dict[str, list[str]] = {}  # Reward -> its columns.
    for rollout, ids, valid in answers:
      values: dict[str, Any] = {}
      for name, fn in reward_fns.items():
        reward = rewards.parts_of(fn(rollout, ids))
        columns = rewards.columns(reward, name)
        names[name] = list(columns)
        values |= {f"score {column}": x for column, x in columns.items()}
        if reward.satisfied is not None:
          values["satisfied"] = reward.satisfied
      values |= {
        "kl": np.zeros(len(valid)) if ref_params is None else kl_fn(ref_params, rollout),
        "lengths": jnp.sum(rollout.response_mask, axis=1),
        "ended": generation.ended(rollout, *stops),
      }
      parts.append({name: np.asarray(v)[valid] for name, v in sharding.to_host(values).items()})
      texts = rewards.response_texts(rollout, tokenizer.batch_decode)
      responses += [text for text, on in zip(texts, valid, strict=True) if on]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    scores = {name: joined[f"score {name}"] for columns in names.values() for name in columns}
    by_policy = []
    for name, fn in reward_fns.items():
      named = {of.partition("/")[2]: scores[of] for of in names[name][1:]}
      worst = judges.worst_of(fn, named)
      if worst is not None:
        by_policy.append(name)
        scores[name] = worst
      rewards.require(judges.name_of(fn), scores[name], named)
    return Samples(
      prompts=[row["prompt_text"] for row in dataset.rows],
      responses=responses,
      rewards=scores,
      kl=joined["kl"],
      lengths=joined["lengths"],
      ended=joined["ended"],
      satisfied=joined.get("satisfied"),
      by_policy=tuple(by_policy),
    )

  return score


def heldout_sampler(
  run: loop.Run,
  model: Model,
  dataset: data.Dataset,
  tokenizer: data.Tokenizer,
  config: generation.SamplingConfig,
  *,
  reward_fns: Mapping[str, rewards.RewardFn],
  ref_params: Params | None = None,
  batch_size: int = 128,
) -> Callable[..., Samples]:
  """Builds `sample(params, index=0)`: one scored response of a policy per held-out prompt.

  See `heldout_responder` and `heldout_scorer`.
  """
  given = model, dataset, tokenizer, config
  respond = heldout_responder(run, *given, batch_size)
  score = heldout_scorer(*given, reward_fns=reward_fns, ref_params=ref_params)
  return lambda params, index=0: score(respond(params, index))


def preferences(
  prefer: rewards.PreferenceFn, first: Iterable[Answered], second: Iterable[Answered]
) -> np.ndarray:
  """Returns the usable preferences [B] for the responses of the first policy, one per prompt.

  Args:
    prefer: Preference between two responses.
    first: Responses of a policy.
    second: Responses of another one to the same prompts, sampled with another index.
  """
  values = np.concatenate(
    [
      sharding.to_host(prefer(a.rollout, b.rollout, a.prompt_ids))[a.valid]
      for a, b in zip(first, second, strict=True)
    ]
  )
  rewards.require(judges.name_of(prefer), values)
  return values[np.isfinite(values)]


# Index of the random key of a baseline: its samples are independent of those of the policies.
BASELINE = 1


def heldout_key(run: loop.Run, index: int) -> jax.Array:
  """Returns a key on the mesh, as in training, so that both use the same compiled sampler."""
  on_mesh = sharding.put(np.int32(index), sharding.replicated(run.mesh))
  return jax.random.fold_in(run.key_for(2), on_mesh)


def heldout_batch_size(run: loop.Run, dataset: data.Dataset, most: int) -> int:
  """Returns a batch size of at most `most` prompts, rounded up to a multiple of the devices."""
  size = min(most, max(len(dataset.examples), 1))
  return size + -size % sharding.row_parts(run.mesh)


def sample_rows(samples: Samples) -> Sequence[dict[str, Any]]:
  """Returns the rows of a table or file of samples."""
  return [
    {
      "prompt": samples.prompts[i],
      "response": samples.responses[i],
      **{name: float(values[i]) for name, values in samples.rewards.items()},
    }
    for i in range(len(samples.responses))
  ]


def answers(samples: Mapping[str, Samples], count: int = 1) -> list[dict[str, str]]:
  """Returns the first answers of policies to the first prompts, each with its last reward, if any.

  Args:
    samples: Samples of the policies by name.
    count: Samples per prompt.
  """

  def answer(of: Samples, i: int) -> str:
    shown = [f"  [{name} {values[i]:.2f}]" for name, values in of.rewards.items()]
    return of.responses[i] + "".join(shown[-1:])

  prompts = next(iter(samples.values())).prompts
  return [
    {"prompt": prompts[i]} | {name: answer(of, i) for name, of in samples.items()}
    for i in range(0, min(4 * count, len(prompts)), count)
  ]


def usable(name: str, *samples: Samples, count: int = 1) -> list[np.ndarray]:
  """Returns a reward of the samples of policies, on the prompts where it is usable for all of them.

  Args:
    name: Name of the reward.
    *samples: Samples of policies.
    count: Samples per prompt.

  Returns:
    [P, count] for each policy, NaN where a sample is unusable; each prompt has one that is not.
  """
  scores = [np.reshape(of.rewards[name], (-1, count)) for of in samples]
  fine = np.all([np.isfinite(x).any(axis=1) for x in scores], axis=0)
  return [x[fine] for x in scores]


def means(before: Samples, after: Samples, count: int = 1) -> dict[str, float]:
  """Means of the trained policy, and of the initial policy on the same prompts.

  Args:
    before: Samples of the initial policy.
    after: Samples of the trained policy.
    count: Samples per prompt.
  """
  metrics: dict[str, float] = {
    "kl": float(np.mean(after.kl)),
    "length": float(np.mean(after.lengths)),
    "length_before": float(np.mean(before.lengths)),
    "eos_fraction": float(np.mean(after.ended)),
  }
  for name in after.rewards:
    values, start = (np.nanmean(x, axis=1) for x in usable(name, after, before, count=count))
    metrics[f"{name}/mean"] = float(np.mean(values))
    metrics[f"{name}/mean_before"] = float(np.mean(start))
  before_violations = {f"{name}_before": share for name, share in before.violations.items()}
  return metrics | after.violations | before_violations


def win_rates(before: Samples, after: Samples) -> dict[str, float]:
  """Win rates of the trained policy by each reward, with their intervals.

  A win rate is the probability that a response of the one beats an independent response of the
  other, so `before` must be sampled with the index `BASELINE`. A reward that is chosen for each
  policy has none.
  """
  metrics = {}
  for name in after.rewards:
    if name in after.by_policy:
      continue
    rate = evaluation.win_rate(*usable(name, after, before))
    metrics[f"{name}/win_rate"] = rate.value
    metrics[f"{name}/win_rate_low"], metrics[f"{name}/win_rate_high"] = rate.low, rate.high
  return metrics


def agreement(before: Samples, after: Samples) -> dict[str, float]:
  """Accuracy of the proxy on samples of a policy, as `reward/accuracy`.

  It is the share of prompts on which the proxy prefers the same one of the two responses, of the
  policy and of the baseline, as the gold reward. Empty without a proxy, without a gold reward,
  without two responses that differ, and if the proxy is chosen for each policy.
  """
  if not {"reward", "gold"} <= after.rewards.keys() or "reward" in after.by_policy:
    return {}
  proxy, gold = (after.rewards[name] - before.rewards[name] for name in ("reward", "gold"))
  agrees = (proxy * np.sign(gold))[(gold != 0) & np.isfinite(proxy)]
  if not agrees.size:
    return {}
  return {"reward/accuracy": evaluation.win_rate(agrees, np.zeros_like(agrees)).value}


def comparison_table(metrics: Mapping[str, float], before: Samples) -> dict[str, dict[str, float]]:
  """Arranges the metrics of `means` and `win_rates` as rows of the final table of a script."""
  known = {**metrics, "kl_before": 0.0, "eos_fraction_before": float(np.mean(before.ended))}
  both = lambda name: {"start": known[f"{name}_before"], "trained": known[name]}  # noqa: E731
  rows: dict[str, dict[str, float]] = {}
  for name in before.rewards:
    rows[f"{name} (mean)"] = both(f"{name}/mean")
    if f"{name}/win_rate" in metrics:
      rows[f"{name}: win rate against the start"] = {"trained": metrics[f"{name}/win_rate"]}
  rows["KL to the start, nats"] = both("kl")
  rows["length, tokens"] = both("length")
  rows["ended by itself"] = both("eos_fraction")
  for name in before.violations:
    rows["violates a constraint"] = both(name)
  return rows


def demonstration_loss(
  run: loop.Run,
  model: Model,
  sets: Sequence[data.Dataset],
  tokenizer: data.Tokenizer,
  batch_size: int = 128,
) -> Callable[[Params], dict[str, float]]:
  """Builds `loss(params)`: `nll` of a policy on demonstrations in nats per token, as of SFT.

  Args:
    run: Opened run.
    model: Architecture of the policies.
    sets: Data set of demonstrations; without one the function returns an empty dict.
    tokenizer: Tokenizer of the policies.
    batch_size: Rows per call of the model.
  """
  row_sums = jax.jit(functools.partial(sft.row_sums, model.apply))

  def loss(params: Params) -> dict[str, float]:
    metrics = {}
    for dataset in sets:
      size = heldout_batch_size(run, dataset, batch_size)
      measure = functools.partial(row_sums, params)
      nll, _ = sft.mean_metrics(measure_rows(run, dataset, size, tokenizer.pad_id, measure))
      metrics["nll"] = float(nll)
    return metrics

  return loss


def prefixed(heldout: data.Dataset) -> dict[str, data.Dataset]:
  """Returns a held-out set and its named sets, by the prefixes of their metrics."""
  return {"eval": heldout} | {f"eval/{name}": of for name, of in heldout.named.items()}


class Judge:
  """Compares a policy in training with the initial policy, on held-out prompts.

  Args:
    run: Opened run.
    model: Architecture of both policies.
    tokenizer: Tokenizer of both policies.
    prompts: Held-out prompts; if empty, all evaluation is skipped.
    sampling: Settings of the sampler.
    reward_fns: Rewards of the responses, by name.
    ref_params: Params of the initial policy.
    prefer: Preference between responses, if they are also compared directly.
    batch_size: Prompts per call of the model; the batch size of training needs no recompilation.
    export: Function that writes the export of the policy.
    named: Judges of further prompts by the names of their sets.
  """

  def __init__(
    self,
    run: loop.Run,
    model: Model,
    tokenizer: data.Tokenizer,
    prompts: data.Dataset,
    sampling: generation.SamplingConfig,
    reward_fns: Mapping[str, rewards.RewardFn],
    ref_params: Params,
    *,
    prefer: rewards.PreferenceFn | None = None,
    batch_size: int = 128,
    export: Callable[[Params], None],
    named: Mapping[str, "Judge"] = types.MappingProxyType({}),
  ):
    self._run, self._tokenizer, self._prompts, self._named = run, tokenizer, prompts, named
    self._ref_params, self._export, self._prefer = ref_params, export, prefer
    given = model, prompts, tokenizer, sampling
    self._respond = heldout_responder(run, *given, batch_size)
    self._score = heldout_scorer(*given, reward_fns=reward_fns, ref_params=ref_params)
    self._answers = once_per_step(lambda params, step: list(self._respond(params, 0)))
    self._sample_once = once_per_step(lambda params, step: self._score(self._answers(params, step)))

  def preference(self, params: Params, step: int, other: Params) -> evaluation.Estimate:
    """Mean preference for the policy at a step over another one on the held-out prompts."""
    return self._preferred(params, step, self._respond(other, BASELINE))

  def _preferred(
    self, params: Params, step: int, others: Iterable[Answered]
  ) -> evaluation.Estimate:
    if self._prefer is None:
      raise ValueError("the judge was given no preference")
    return evaluation.mean(preferences(self._prefer, self._answers(params, step), others))

  def measure(self, params: Params, step: int) -> dict[str, float]:
    """Writes responses to the held-out prompts and returns their mean rewards and KL."""
    self._run.writer.table(step, "samples", sample_rows(self._sample_once(params, step)))
    means = self._means("eval", params, step)
    for name, judge in self._named.items():
      means |= judge._means(f"eval/{name}", params, step)
    return means

  def _means(self, prefix: str, params: Params, step: int) -> dict[str, float]:
    samples = self._sample_once(params, step)
    values = {name: float(np.nanmean(r)) for name, r in samples.rewards.items()}
    values |= {"kl": float(np.mean(samples.kl)), **samples.violations}
    return {f"{prefix}/{name}": value for name, value in values.items()}

  def evaluate(
    self, params_of: Callable[[Any], Params]
  ) -> Callable[[Any, int], dict[str, float]] | None:
    """Builds `(state, step) -> metrics` for `loop.fit`; None without held-out prompts."""
    if not self._prompts.examples:
      return None
    return lambda state, step: self.measure(params_of(state), step)

  def finish(
    self, params: Params, step: int, title: str, metrics: Mapping[str, float] | None = None
  ) -> dict[str, float]:
    """Exports the trained policy, compares it with the initial policy and writes summary.json."""
    run = self._run
    self._export(params)
    summary = dict(metrics or {})
    if self._prompts.examples:
      of_start = list(self._respond(self._ref_params, BASELINE))
      after, before = self._sample_once(params, step), self._score(of_start)
      found = means(before, after) | win_rates(before, after)
      summary |= found | agreement(before, after)
      table = comparison_table(found, before)
      if self._prefer is not None:
        rate = self._preferred(params, step, of_start)
        summary |= {
          "preference/win_rate": rate.value,
          "preference/win_rate_low": rate.low,
          "preference/win_rate_high": rate.high,
        }
        table["preferred to the start"] = {"start": 0.5, "trained": rate.value}
      reporting.save_samples(run.workdir, 0, sample_rows(before))
      run.writer.table(step, "samples", sample_rows(after))
      reporting.show_samples(answers({"start": before, "trained": after}), "Before and after")
      reporting.show_summary(f"{title}, held-out prompts", table)
    trained = run.session.workdir
    samples = f"--workdir={trained.rstrip('/')}_samples"
    training.finish(run, self._tokenizer, summary, "generate", samples, f"--init_from={trained}")
    return summary
