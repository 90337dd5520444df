r"""Samples responses of a model to prompts of a file, of the built-in task, or to one.

To 16 prompts of --data.path=PROMPTS.jsonl, or held-out ones of the built-in task:
  python -m experiments.generate --workdir=runs/samples --init_from=runs/ppo \
    --limit=16
To one prompt:
  python -m experiments.generate --workdir=runs/samples --init_from=FOLDER \
    --prompt="What is the capital of France?" --sampling.temperature=0

Scored by a reward model:
  --reward.path=runs/rm
Scored by a Python function, here of your file my_rewards.py:
  --reward.name=my_rewards:brevity

It writes the responses to `samples/step_00000000.jsonl` and shows the first few.
"""

import dataclasses

import numpy as np

from rlhf_jax import data, entry, loop, ranges, reporting, rewards, sharding
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from .lab import evaluating, given_rows, judges, limits, models


@dataclasses.dataclass(frozen=True)
class Config:
  """Prompts to answer, and the model.

  Attributes:
    init_from: Model: the workdir of a finished run, or a Hugging Face folder.
    prompt: Prompt to answer; empty takes those of --data.eval_path or else of --data.path.
    limit: Maximum number of prompts.
    batch_size: Prompts per call of the model.
  """

  init_from: str
  prompt: str = ""
  limit: int = 64
  batch_size: int = 16
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig()
  reward: judges.RewardOptions = judges.RewardOptions()

  def __post_init__(self):
    ranges.check(self, at_least_one=("limit", "batch_size"))


def generate(session: loop.Session, config: Config) -> list[dict[str, str | float]]:
  """Samples responses, writes and shows them, and returns the rows that were written."""
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data)
  if config.prompt:
    prompts = data.prompts_from_texts([config.prompt], tokenizer)
    data.require_known("--prompt", [prompts.examples[0]["prompt"]], tokenizer)
  else:
    prompts = given_rows.prompts(
      session,
      "Samples",
      config.data,
      tokenizer,
      limit=config.limit,
      every=True,
      model=folder,
    )
  limits.require_length(config, folder, answered=[prompts])
  with loop.open_run(session) as run:
    model, params = models.open_model(run, config.model, folder, tokenizer)
    params = sharding.make_reshard(run.mesh, model.config.dtype)(params)
    sample = models.make_sampler(model, tokenizer, config.sampling)
    reward_fn = None
    if config.reward.is_given:
      reward_fn = judges.open_reward(run, config.reward, config.model, tokenizer)(prompts)
    batch_size = evaluating.heldout_batch_size(run, prompts, config.batch_size)
    rows: list[dict[str, str | float]] = []
    for batch, valid in data.eval_batches(prompts, batch_size, tokenizer.pad_id):
      placed = sharding.place_batch(batch, run.mesh)
      rollout = sample(params, placed.tokens, placed.mask, placed.prompt_id, run.key_for(2))
      repeats = config.sampling.samples_per_prompt
      texts = rewards.response_texts(rollout, tokenizer.batch_decode)
      ids, keep = np.repeat(batch.prompt_id, repeats), np.repeat(valid, repeats)
      values = {"logprob": sharding.to_host(rollout.logprobs.sum(axis=1))}
      if reward_fn is not None:
        reward = rewards.parts_of(reward_fn(rollout, ids))
        values |= sharding.to_host(rewards.columns(reward))
        if reward.satisfied is not None:
          values["satisfied"] = reward.satisfied
      for n, (i, text) in enumerate(zip(ids.tolist(), texts, strict=True)):
        if keep[n]:
          numbers = {name: float(column[n]) for name, column in values.items()}
          rows.append({"prompt": prompts.rows[i]["prompt_text"], "response": text, **numbers})
    reporting.save_samples(run.workdir, 0, rows)
    reporting.show_samples(rows, f"Samples of {config.init_from}")
    if reward_fn is not None:
      scores = {name: np.array([row[name] for row in rows]) for name in rows[0] if "reward" in name}
      named = {name.partition("/")[2]: x for name, x in scores.items() if name != "reward"}
      rewards.require(judges.name_of(reward_fn), scores["reward"], named)
  return rows


if __name__ == "__main__":
  entry.run_script(generate, loop.Session, Config)
