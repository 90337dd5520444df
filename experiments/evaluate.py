r"""Compares policies with a baseline on held-out prompts: reward, win rate, KL, length, diversity.

Built-in task, judged by its gold reward (half a minute on two CPU cores):
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/ppo --baseline=runs/sft
Several policies, judged by the reward model as well, with the best-of-n line of the baseline:
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/ppo,runs/ppo_free \
    --baseline=runs/sft --reward.path=runs/rm --sampling.samples_per_prompt=16
Your prompts, judged by a reward model or a Python reward:
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/ppo --baseline=FOLDER \
    --data.path=PROMPTS.jsonl --reward.path=runs/rm

Who beats whom, by a preference model or function: a win-rate matrix of all of them
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/nash,runs/ppo \
    --baseline=runs/sft --preference.name=panel

Prints one row per policy. Writes summary.json (the figures of one policy, or of several by name),
the responses of baseline and policies to `samples/` (steps 0, 1, ...), and `plots/frontier.png`:
each reward over the KL to the baseline. Intervals are those of 95 %.

More samples per prompt (--sampling.samples_per_prompt) narrow the intervals, and give the best-of-n
line and the diversity per input, that of the answers to one prompt. The time grows with them;
--data.eval_rows=128 takes fewer prompts.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lab import evaluating, judges, line_files, models
from rlhf_jax import data, entry, evaluation, flags, loop, plots, reporting
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import hf


@dataclasses.dataclass(frozen=True)
class Config:
  """What to compare.

  Attributes:
    policy: Workdir of a finished run, or a Hugging Face folder; several, separated by commas.
    baseline: The same of what they are compared with, which is also the reference of the KL.
    batch_size: Prompts per call.
  """

  policy: tuple[str, ...]
  baseline: str
  batch_size: int = 128
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  reward: judges.RewardOptions = judges.RewardOptions()
  preference: judges.PreferenceOptions = judges.PreferenceOptions()

  def __post_init__(self):
    if not self.policy:
      raise ValueError("policy must name a folder")


def evaluate(session: loop.Session, config: Config) -> dict[str, Any]:
  """Samples baseline and policies, writes and shows the comparison, returns summary.json."""
  names = line_files.short_names("policy", (config.baseline, *config.policy))
  folders = [models.model_folder(path) for path in (config.baseline, *config.policy)]
  tokenizer = models.open_tokenizer(folders[0], config.data.end_token)
  for path, folder in zip(config.policy, folders[1:], strict=True):
    if models.open_tokenizer(folder, config.data.end_token).digest != tokenizer.digest:
      raise flags.UsageError(
        f"--policy={path} has another tokenizer than --baseline: no KL between them"
      )
    if hf.parse_config(folder)[0] != hf.parse_config(folders[0])[0]:
      raise flags.UsageError(f"--policy={path} has another architecture than --baseline")
  _, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  count = config.sampling.samples_per_prompt
  prompts = repeat(heldout, count)
  with loop.open_run(session) as run:
    model, base_params = models.open_model(run, config.model, folders[0], tokenizer)
    reward_fns = judges.gold_rewards(config.data, prompts, tokenizer)
    if config.reward != judges.RewardOptions() or not reward_fns:
      reward_of = judges.open_reward(run, config.reward, config.model, tokenizer)
      reward_fns = {"reward": reward_of(prompts), **reward_fns}
    sample = evaluating.heldout_sampler(
      run,
      model,
      prompts,
      tokenizer,
      config.sampling,
      reward_fns=reward_fns,
      ref_params=base_params,
      batch_size=config.batch_size,
    )
    is_pairwise = config.preference != judges.PreferenceOptions()
    samples = {names[0]: sample(base_params)}
    policies = {names[0]: base_params}
    for name, folder in zip(names[1:], folders[1:], strict=True):
      params = models.open_model(run, config.model, folder, tokenizer)[1]
      samples[name] = sample(params)
      if is_pairwise:
        policies[name] = params

    figures = {
      name: evaluating.compare(samples[names[0]], drawn)
      | intervals(samples[names[0]], drawn, count)
      | diversity(tokenizer.encode_responses(drawn.responses), count, tokenizer.vocab_size)
      for name, drawn in samples.items()
    }
    for step, (name, drawn) in enumerate(samples.items()):
      rows = [{"policy": name} | row for row in evaluating.sample_rows(drawn)]
      reporting.save_samples(run.workdir, step, rows)
    reporting.show_samples(answers(samples, count), "Baseline and policies")
    show(figures, list(reward_fns))
    charts = frontier(figures, best_of_n(samples[names[0]], count), names[0])
    plots.save_chart(run.workdir / "plots" / "frontier.png", *charts)
    summary = figures[names[1]] if len(names) == 2 else {name: figures[name] for name in names}
    if is_pairwise:
      prefer_of = judges.open_preference(run, config.preference, config.model, tokenizer)
      compare = evaluating.heldout_comparer(
        run,
        model,
        heldout,
        tokenizer,
        config.sampling,
        prefer_of(heldout),
        batch_size=config.batch_size,
      )
      matrix = win_rate_matrix(policies, compare)
      show_matrix(matrix)
      summary = summary | {"preference/win_rates": matrix}
    reporting.write_summary(run.workdir, summary)
  return summary


def repeat(prompts: data.Dataset, count: int) -> data.Dataset:
  """Every prompt `count` times in a row: each copy is sampled on its own."""
  examples = [example for example in prompts.examples for _ in range(count)]
  rows = [row for row in prompts.rows for _ in range(count)]
  return prompts._replace(examples=examples, rows=rows)


def intervals(
  before: evaluating.Samples, after: evaluating.Samples, count: int
) -> dict[str, float]:
  """Means and win rates with their intervals, and how far the proxy can be trusted."""
  by_prompt = lambda x: np.reshape(x, (-1, count))  # noqa: E731
  estimates = {"kl": evaluation.mean(np.mean(by_prompt(after.kl), axis=1))}
  for name, values in after.rewards.items():
    values, start = by_prompt(values), by_prompt(before.rewards[name])
    estimates[f"{name}/mean"] = evaluation.mean(np.mean(values, axis=1))
    estimates[f"{name}/win_rate"] = evaluation.win_rate(values, start)
  figures = {}
  for name, estimate in estimates.items():
    figures[name], figures[f"{name}_low"], figures[f"{name}_high"] = estimate
  if {"reward", "gold"} <= after.rewards.keys():
    # Whether the proxy prefers the response of the two that the gold reward prefers.
    proxy, gold = (after.rewards[name] - before.rewards[name] for name in ("reward", "gold"))
    agrees = (proxy * np.sign(gold))[gold != 0]
    if agrees.size:
      figures["reward/accuracy"] = evaluation.win_rate(agrees, np.zeros_like(agrees)).value
  return figures


def diversity(tokens: Sequence[Sequence[int]], count: int, vocab_size: int) -> dict[str, float]:
  """Diversity of the first responses across prompts, and of all responses to one prompt."""
  texts = [ids[:-1] for ids in tokens]  # Without the end token.
  figures = {}
  if len(texts[::count]) > 1:
    found = evaluation.diversity(texts[::count], vocab_size)
    figures |= {f"diversity/{name}": value for name, value in found.items()}
  if count > 1:
    groups = [texts[i : i + count] for i in range(0, len(texts), count)]
    found = [evaluation.diversity(group, vocab_size) for group in groups]
    figures |= {
      f"diversity_per_input/{name}": float(np.mean([each[name] for each in found]))
      for name in found[0]
    }
  return figures


def best_of_n(samples: evaluating.Samples, count: int) -> dict[str, plots.Line]:
  """Reward name -> line of the best of 1, 2, 4, ... `count` samples, chosen by the first reward."""
  if count == 1:
    return {}
  sizes = [2**i for i in range(int(math.log2(count)) + 1)]
  pools = {name: np.reshape(values, (-1, count)) for name, values in samples.rewards.items()}
  proxy = next(iter(pools.values()))
  kl = np.array([evaluation.best_of_n_kl(n) for n in sizes])
  lines = {}
  for name, pool in pools.items():
    estimates = [evaluation.mean(evaluation.best_of_n(proxy, pool, n)) for n in sizes]
    lines[name] = plots.Line(f"best of 1 to {sizes[-1]}", kl, *np.array(estimates).T)
  return lines


def frontier(
  figures: Mapping[str, Mapping[str, float]], lines: Mapping[str, plots.Line], baseline: str
) -> list[plots.Chart]:
  """One chart per reward: policies at their KL to the baseline, with 95 % intervals."""
  titles = {"reward": "Reward (proxy)", "gold": "Gold reward"}
  rewards = [name.removesuffix("/mean") for name in figures[baseline] if name.endswith("/mean")]

  def point(policy: str, reward: str) -> plots.Point:
    of = figures[policy]
    x_range, y_range = ((of[f"{f}_low"], of[f"{f}_high"]) for f in ("kl", f"{reward}/mean"))
    return plots.Point(policy, of["kl"], of[f"{reward}/mean"], x_range, y_range)

  return [
    plots.Chart(
      f"{titles[reward]} against KL",
      f"KL to {baseline} (nats per response, root scale)",
      f"{titles[reward]}, mean of held-out prompts",
      lines=[lines[reward]] if lines else [],
      points=[point(policy, reward) for policy in figures],
      root_x=True,
    )
    for reward in rewards
  ]


def answers(samples: Mapping[str, evaluating.Samples], count: int) -> list[dict[str, str]]:
  """The first answers of all policies to the first prompts, with their last reward."""

  def answer(of: evaluating.Samples, i: int) -> str:
    name = list(of.rewards)[-1]
    return f"{of.responses[i]}  [{name} {of.rewards[name][i]:.2f}]"

  prompts = next(iter(samples.values())).prompts
  return [
    {"prompt": prompts[i]} | {name: answer(of, i) for name, of in samples.items()}
    for i in range(0, min(4 * count, len(prompts)), count)
  ]


def win_rate_matrix(
  policies: Mapping[str, Any], compare: Callable[[Any, Any], np.ndarray]
) -> dict[str, dict[str, dict[str, float]]]:
  """How often each policy is preferred to each other one, with the 95 % interval.

  Args:
    policies: Params by name.
    compare: `(params, other) -> [B]` preferences, one per prompt.

  Returns:
    Name -> name of the other -> `value`, `low` and `high`; both directions come from the same
    responses, so they sum to 1.
  """
  matrix: dict[str, dict[str, dict[str, float]]] = {name: {} for name in policies}
  for a, b in itertools.combinations(policies, 2):
    wins = compare(policies[a], policies[b])
    for first, second, values in ((a, b, wins), (b, a, 1 - wins)):
      matrix[first][second] = evaluation.mean(values)._asdict()
  return matrix


def show_matrix(matrix: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
  """A row per policy: how often it is preferred to that of the column."""

  def cell(rate: Mapping[str, float]) -> str:
    return f"{rate['value']:.3f} ± {(rate['high'] - rate['low']) / 2:.3f}"

  reporting.show_summary(
    "The policy of the row is preferred to that of the column: share, half of the 95 % interval",
    {
      name: {other: cell(of[other]) if other in of else "" for other in matrix}
      for name, of in matrix.items()
    },
  )


def show(figures: Mapping[str, Mapping[str, float]], rewards: Sequence[str]) -> None:
  """The tables at the end, one row per policy."""

  def pm(of: Mapping[str, float], name: str) -> str:
    return f"{of[name]:.3f} ± {(of[f'{name}_high'] - of[f'{name}_low']) / 2:.3f}"

  table = {}
  for policy, of in figures.items():
    table[policy] = {"KL, nats": pm(of, "kl")}
    for reward in rewards:
      table[policy] |= {
        f"{reward} (mean)": pm(of, f"{reward}/mean"),
        f"{reward} (win rate)": pm(of, f"{reward}/win_rate"),
      }
  reporting.show_summary("Held-out prompts: mean or share, and half of the 95 % interval", table)
  columns = {
    "length": "length",
    "ended": "eos_fraction",
    "proxy agrees with gold": "reward/accuracy",
    "distinct 1": "diversity/distinct_1",
    "distinct 2": "diversity/distinct_2",
    "EAD": "diversity/ead",
    "alike": "diversity/self_similarity",
    "EAD per input": "diversity_per_input/ead",
    "alike per input": "diversity_per_input/self_similarity",
  }
  reporting.show_summary(
    "Responses",
    {
      policy: {title: of[name] for title, name in columns.items() if name in of}
      for policy, of in figures.items()
    },
  )


if __name__ == "__main__":
  entry.run_script(evaluate, loop.Session, Config)
