r"""Compares a policy with a baseline on held-out prompts: reward, win rate, KL, length.

Built-in task, judged by its gold reward:
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/ppo --baseline=runs/sft
Your prompts, judged by a reward model or a Python reward:
  python -m experiments.evaluate --workdir=runs/eval --policy=runs/ppo --baseline=FOLDER \
    --data.path=PROMPTS.jsonl --reward.path=runs/rm

Prints a table; writes summary.json, and both policies' responses to `samples/`.
"""

import dataclasses

from experiments import common
from rlhf_jax import data, flags, loop, reporting
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """What to compare.

  Attributes:
    policy: Workdir of a finished run, or a Hugging Face folder.
    baseline: The same of what it is compared with, which is also the reference of the KL.
    batch_size: Prompts per call.
  """

  policy: str
  baseline: str
  batch_size: int = 128
  model: common.ModelOptions = common.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  reward: common.RewardOptions = common.RewardOptions()


def evaluate(session: loop.Session, config: Config) -> dict[str, float]:
  """Samples both policies, writes and shows the comparison, returns summary.json."""
  policy_folder = common.model_folder(config.policy)
  baseline_folder = common.model_folder(config.baseline)
  tokenizer = common.open_tokenizer(policy_folder, config.data.end_token)
  if common.open_tokenizer(baseline_folder, config.data.end_token).digest != tokenizer.digest:
    raise flags.UsageError("--policy and --baseline have different tokenizers: no KL between them")
  _, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    model, params = common.open_model(run, config.model, policy_folder, tokenizer)
    base_model, base_params = common.open_model(run, config.model, baseline_folder, tokenizer)
    if base_model.config != model.config:
      raise flags.UsageError("--policy and --baseline have different architectures")
    reward_fns = common.gold_rewards(config.data, heldout, tokenizer)
    if config.reward != common.RewardOptions() or not reward_fns:
      reward_of = common.open_reward(run, config.reward, config.model, tokenizer)
      reward_fns["reward"] = reward_of(heldout)
    sample = common.heldout_sampler(
      run,
      model,
      heldout,
      tokenizer,
      config.sampling,
      reward_fns=reward_fns,
      ref_params=base_params,
      batch_size=config.batch_size,
    )
    before, after = sample(base_params), sample(params)
    summary = common.compare(before, after)
    reporting.save_samples(run.workdir, 0, common.sample_rows(before))
    reporting.save_samples(run.workdir, 1, common.sample_rows(after))
    reporting.show_samples(common.side_by_side(before, after), "Baseline and policy")
    reporting.show_summary("Held-out prompts", common.comparison_table(before, after))
    reporting.write_summary(run.workdir, summary)
  return summary


if __name__ == "__main__":
  flags.run_script(evaluate, loop.Session, Config)
