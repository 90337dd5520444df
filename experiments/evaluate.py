r"""Compares policies with a baseline on held-out prompts, with confidence intervals.

Built-in task, judged by its gold reward (half a minute on two CPU cores):
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/ppo --baseline=runs/sft
Several policies, also judged by the reward model, with the best-of-n curve of the baseline:
  python -m experiments.evaluate --workdir=runs/eval --baseline=runs/sft \
    --policy=runs/ppo,runs/ppo_free --reward.path=runs/rm --sampling.samples_per_prompt=16
Your prompts, judged by a reward model or a Python reward:
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/ppo \
    --baseline=FOLDER --data.path=PROMPTS.jsonl --reward.path=runs/rm
By language, source or any other column, with the worst group and the spread:
  --data.group=COLUMN
Prompts of the built-in task as no training prompt is worded:
  --data.split=shift
Matrix of win rates between all policies, by a preference model or function:
  python -m experiments.evaluate --workdir=runs/eval --baseline=runs/sft \
    --policy=runs/nash,runs/ppo --preference.name=panel
A reward model instead, on pairs with a `subset`, such as those of RewardBench:
  python -m experiments.evaluate --workdir=runs/bench --rewardbench=FILE --reward.path=runs/rm

It prints one row per policy: reward and win rate with their number of prompts, KL to the baseline,
length, diversity, and `nll`, the loss on demonstrations, with 95 % confidence intervals. It writes
these metrics to summary.json (by policy if there are several), the responses to `samples/`
(baseline and policies as steps 0, 1, ...), and each reward over the KL to `plots/frontier.png`.
More samples per prompt narrow the intervals, give the best-of-n curve and the diversity of
responses to the same prompt, and take more time; --data.eval_rows=128 evaluates on fewer prompts.
"""

import dataclasses
from typing import Any

from rlhf_jax import defaults, entry, flags, loop, plots, reporting
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import hf
from .lab import (
  benchmark,
  comparison,
  evaluating,
  given_rows,
  grouping,
  judges,
  limits,
  line_files,
  models,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Policies to compare.

  Attributes:
    policy: Policies to evaluate, separated by commas: workdirs of finished runs, or Hugging Face
      folders.
    baseline: Workdir or Hugging Face folder of the policy to compare with, which is also the
      reference of the KL.
    rewardbench: File of pairs (prompt, chosen, rejected, subset), on which the reward is measured
      instead of policies: its accuracy, also by category and subset.
    demonstrations: File of demonstrations, on which the loss of each policy is measured; empty
      takes held-out ones of the built-in task, and none for prompts of a file.
    batch_size: Prompts per call of the model.
  """

  policy: tuple[str, ...] = ()
  baseline: str = ""
  rewardbench: str = ""
  demonstrations: str = ""
  batch_size: int = 128
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  reward: judges.RewardOptions = judges.RewardOptions()
  preference: judges.PreferenceOptions = judges.PreferenceOptions()

  def __post_init__(self):
    defaults.settle(self)


def evaluate(session: loop.Session, config: Config) -> dict[str, Any]:
  """Samples baseline and policies, writes and shows the comparison; returns summary.json."""
  loop.require_no_steps(session)
  if benchmark.is_asked(config):
    return benchmark.measure(session, config)
  names = line_files.short_names("policy", (config.baseline, *config.policy))
  folders = [models.finished_folder(path) for path in (config.baseline, *config.policy)]
  tokenizer = models.open_tokenizer(folders[0], config.data)
  for path, folder in zip(config.policy, folders[1:], strict=True):
    if models.open_tokenizer(folder, config.data).digest != tokenizer.digest:
      raise flags.UsageError(
        f"--policy={path} has another tokenizer or chat template than --baseline, so no KL;"
        " --data.template_args and --data.end_token are taken for both"
      )
    if hf.parse_config(folder)[0] != hf.parse_config(folders[0])[0]:
      raise flags.UsageError(f"--policy={path} has another architecture than --baseline")
  models_of = {"policy": ", ".join(config.policy), "baseline": config.baseline}
  checks = config.reward.checks
  heldout = given_rows.prompts(session, "Evaluation", config.data, tokenizer, checks, **models_of)
  count = config.sampling.samples_per_prompt
  prompts = comparison.repeat(heldout, count)
  groups = grouping.groups_of(heldout, config.data)
  demonstrations = given_rows.demonstrations(session, config.data, config.demonstrations, tokenizer)
  limits.require_length(config, folders[0], read=demonstrations, answered=[heldout])
  with loop.open_run(session) as run:
    model, base_params = models.open_model(run, config.model, folders[0], tokenizer, frozen=True)
    reward_fns = judges.gold_rewards(config.data, prompts, tokenizer)
    if config.reward != judges.RewardOptions() or not reward_fns:
      reward_of = judges.open_reward(run, config.reward, config.model, tokenizer)
      reward_fns = {"reward": reward_of(prompts), **reward_fns}
    size = config.batch_size
    sample = evaluating.heldout_sampler(
      run,
      model,
      prompts,
      tokenizer,
      config.sampling,
      reward_fns=reward_fns,
      ref_params=base_params,
      batch_size=size,
    )
    loss_of = evaluating.demonstration_loss(run, model, demonstrations, tokenizer, size)
    is_pairwise, answers = config.preference != judges.PreferenceOptions(), {}
    respond = evaluating.heldout_responder(run, model, heldout, tokenizer, config.sampling, size)
    samples, losses = {}, {}
    for index, (name, folder) in enumerate(zip(names, folders, strict=True)):
      params = base_params
      if index:
        params = models.open_model(run, config.model, folder, tokenizer, frozen=True)[1]
      samples[name] = sample(params, 0 if index else evaluating.BASELINE)
      losses[name] = loss_of(params)
      if is_pairwise:
        answers[name] = list(respond(params, index))
    metrics = comparison.measure(samples, losses, count, tokenizer)
    comparison.save(run.workdir, samples)
    reporting.show_samples(evaluating.answers(samples, count), "Baseline and policies")
    comparison.show(metrics, list(samples[names[0]].rewards))
    best_of_n = comparison.best_of_n(samples[names[0]], count)
    charts = comparison.frontier(metrics, best_of_n, names[0])
    plots.save_chart(run.workdir / "plots" / "frontier.png", *charts)
    by_group = grouping.of_policies(metrics, samples, groups, count)
    summary: dict[str, Any] = {**(metrics[names[1]] if len(names) == 2 else metrics), **by_group}
    if is_pairwise:
      prefer_of = judges.open_preference(run, config.preference, config.model, tokenizer)
      summary |= comparison.matrix(prefer_of(heldout), answers)
    reporting.write_summary(run.workdir, summary)
  return summary


if __name__ == "__main__":
  entry.run_script(evaluate, loop.Session, Config)
