"""Comparison of policies on held-out prompts: metrics with intervals, tables and charts."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_jax import data, evaluation, plots, reporting, rewards
from . import evaluating


def repeat(prompts: data.Dataset, count: int) -> data.Dataset:
  """Repeats every prompt `count` times in a row; each copy gets an independent sample."""
  examples = [example for example in prompts.examples for _ in range(count)]
  rows = [row for row in prompts.rows for _ in range(count)]
  return prompts._replace(examples=examples, rows=rows)


def measure(
  samples: Mapping[str, evaluating.Samples],
  losses: Mapping[str, dict[str, float]],
  count: int,
  tokenizer: data.Tokenizer,
) -> dict[str, dict[str, float]]:
  """Metrics of policies by name; the first of them is the baseline.

  Args:
    samples: Samples of the policies by name.
    losses: Further metrics of the policies by name.
    count: Samples per prompt.
    tokenizer: Tokenizer of the policies.
  """
  baseline = next(iter(samples.values()))
  return {
    name: evaluating.means(baseline, drawn, count)
    | intervals(baseline, drawn, count)
    | diversity(tokenizer.encode_responses(drawn.responses), count, tokenizer.vocab_size)
    | losses[name]
    for name, drawn in samples.items()
  }


def save(workdir: pathlib.Path, samples: Mapping[str, evaluating.Samples]) -> None:
  """Writes the responses of policies into `samples/`, as steps 0, 1 and so on."""
  for step, (name, drawn) in enumerate(samples.items()):
    rows = [{"policy": name} | row for row in evaluating.sample_rows(drawn)]
    reporting.save_samples(workdir, step, rows)


def intervals(
  before: evaluating.Samples, after: evaluating.Samples, count: int
) -> dict[str, float]:
  """Means and win rates with their intervals, and the accuracy of the proxy on the samples.

  A prompt counts with those of its samples on which a reward is usable, if both policies have one;
  `NAME/prompts` is the number of these prompts. A reward without any has no metrics, and one that
  is chosen for each policy no win rate.
  """
  estimates = {"kl": evaluation.mean(np.mean(np.reshape(after.kl, (-1, count)), axis=1))}
  metrics: dict[str, float] = {}
  for name in after.rewards:
    values, start = evaluating.usable(name, after, before, count=count)
    if not len(values):
      continue
    estimates[f"{name}/mean"] = evaluation.mean(np.nanmean(values, axis=1))
    if name not in after.by_policy:
      estimates[f"{name}/win_rate"] = evaluation.win_rate(values, start)
    metrics[f"{name}/prompts"] = len(values)
  for name, estimate in estimates.items():
    metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"] = estimate
  return metrics | evaluating.agreement(before, after)


def diversity(tokens: Sequence[Sequence[int]], count: int, vocab_size: int) -> dict[str, float]:
  """Diversity of the first responses across prompts, and of all responses to one prompt.

  That of one prompt is the mean over the prompts where it is defined: texts of one token have no
  pairs of tokens. A metric that is defined for none is left out.
  """
  texts = [ids[:-1] for ids in tokens]  # Without the end token.
  metrics = {}
  if len(texts[::count]) > 1:
    across = evaluation.diversity(texts[::count], vocab_size)
    metrics |= {f"diversity/{name}": value for name, value in across.items()}
  if count > 1:
    groups = [texts[i : i + count] for i in range(0, len(texts), count)]
    per_input = [evaluation.diversity(group, vocab_size) for group in groups]
    for name in per_input[0]:
      defined = [of[name] for of in per_input if not math.isnan(of[name])]
      metrics[f"diversity_per_input/{name}"] = float(np.mean(defined)) if defined else math.nan
  return {name: value for name, value in metrics.items() if not math.isnan(value)}


def best_of_n(samples: evaluating.Samples, count: int) -> dict[str, plots.Line]:
  """Lines by reward name: the best of 1, 2, 4, ... `count` samples, chosen by the first reward.

  A sample with an unusable reward is never chosen; draws of no other are left out.
  """
  if count == 1:
    return {}
  sizes = [2**i for i in range(int(math.log2(count)) + 1)]
  pools = {name: np.reshape(values, (-1, count)) for name, values in samples.rewards.items()}
  usable = np.all([np.isfinite(pool) for pool in pools.values()], axis=0)
  if not usable.any():
    return {}
  kept = usable.any(axis=1)
  usable, pools = usable[kept], {name: pool[kept] for name, pool in pools.items()}
  proxy = np.where(usable, next(iter(pools.values())), -np.inf)
  shares = [evaluation.best_of_n(proxy, usable, n) for n in sizes]  # Of the draws that count.
  kl = np.array([evaluation.best_of_n_kl(n) for n in sizes])
  lines = {}
  for name, pool in pools.items():
    pool = np.where(usable, pool, 0)
    estimates = [
      evaluation.mean(evaluation.best_of_n(proxy, pool, n) / share)
      for n, share in zip(sizes, shares, strict=True)
    ]
    lines[name] = plots.Line(f"best of 1 to {sizes[-1]}", kl, *np.array(estimates).T)
  return lines


def frontier(
  metrics: Mapping[str, Mapping[str, float]], lines: Mapping[str, plots.Line], baseline: str
) -> list[plots.Chart]:
  """Makes one chart per reward: policies at their KL to the baseline, with 95 % intervals."""
  titles = {"reward": "Reward (proxy)", "gold": "Gold reward"}  # Of others, their names.
  means = dict.fromkeys(name for of in metrics.values() for name in of if name.endswith("/mean"))

  def point(policy: str, reward: str) -> plots.Point:
    of = metrics[policy]
    x_range, y_range = ((of[f"{f}_low"], of[f"{f}_high"]) for f in ("kl", f"{reward}/mean"))
    return plots.Point(policy, of["kl"], of[f"{reward}/mean"], x_range, y_range)

  return [
    plots.Chart(
      f"{titles.get(reward, reward)} against KL",
      f"KL to {baseline} (nats per response, root scale)",
      f"{titles.get(reward, reward)}, mean of held-out prompts",
      lines=[lines[reward]] if lines else [],
      points=[point(policy, reward) for policy, of in metrics.items() if f"{reward}/prompts" in of],
      root_x=True,
    )
    for reward in (name.removesuffix("/mean") for name in means)
  ]


def matrix(
  prefer: rewards.PreferenceFn, answers: Mapping[str, Sequence[evaluating.Answered]]
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
  """Shows and returns the share of prompts on which each policy is preferred to each other one.

  Args:
    prefer: Preference between two responses.
    answers: Responses of each policy by its name, sampled with an index of their own.

  Returns:
    `preference/win_rates`: name -> name of the other policy -> `value`, and the ends `low` and
    `high` of the 95 % interval. Both directions come from the same responses, so their values sum
    to 1.
  """
  rates: dict[str, dict[str, dict[str, float]]] = {name: {} for name in answers}
  for a, b in itertools.combinations(answers, 2):
    wins = evaluating.preferences(prefer, answers[a], answers[b])
    for first, second, values in ((a, b, wins), (b, a, 1 - wins)):
      rates[first][second] = evaluation.mean(values)._asdict()
  show_matrix(rates)
  return {"preference/win_rates": rates}


def show_matrix(matrix: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
  """Shows a row per policy: the share of prompts on which it is preferred to each other one."""

  def cell(rate: Mapping[str, float]) -> str:
    return f"{rate['value']:.3f} ± {(rate['high'] - rate['low']) / 2:.3f}"

  reporting.show_summary(
    "The policy of the row is preferred to that of the column: share, half of the 95 % interval",
    {
      name: {other: cell(of[other]) if other in of else "" for other in matrix}
      for name, of in matrix.items()
    },
  )


def show(metrics: Mapping[str, Mapping[str, float]], rewards: Sequence[str]) -> None:
  """Shows the final tables, one row per policy."""

  def pm(of: Mapping[str, float], name: str) -> str:
    return f"{of[name]:.3f} ± {(of[f'{name}_high'] - of[f'{name}_low']) / 2:.3f}"

  table = {}
  for policy, of in metrics.items():
    table[policy] = {"KL, nats": pm(of, "kl")}
    for reward in (name for name in rewards if f"{name}/prompts" in of):
      table[policy] |= {
        f"{reward} (prompts)": f"{of[f'{reward}/prompts']}",
        f"{reward} (mean)": pm(of, f"{reward}/mean"),
      }
      if f"{reward}/win_rate" in of:
        table[policy][f"{reward} (win rate)"] = pm(of, f"{reward}/win_rate")
  reporting.show_summary("Held-out prompts: mean or share, and half of the 95 % interval", table)
  columns = {
    "length": "length",
    "ended": "eos_fraction",
    "violates": "reward/violations",
    "proxy agrees with gold": "reward/accuracy",
    "distinct 1": "diversity/distinct_1",
    "distinct 2": "diversity/distinct_2",
    "EAD": "diversity/ead",
    "alike": "diversity/self_similarity",
    "EAD per input": "diversity_per_input/ead",
    "alike per input": "diversity_per_input/self_similarity",
    "loss on demonstrations": "nll",
  }
  reporting.show_summary(
    "Responses",
    {
      policy: {title: of[name] for title, name in columns.items() if name in of}
      for policy, of in metrics.items()
    },
  )
