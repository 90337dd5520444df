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

It writes the responses to `samples/step_00000000.jsonl` and shows the first few. `sft` reads that
file. `ended` is false in a row whose response was cut at --sampling.max_new_tokens. The same
command, run again, resumes where it was stopped.
"""

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax import (
  data,
  defaults,
  entry,
  flags,
  generation,
  loop,
  ranges,
  reporting,
  rewards,
  sharding,
)
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from .annotation.items import prompt_text
from .lab import answering, evaluating, given_rows, judges, limits, models

_BUILT_IN = 64  # Prompts of the built-in task, which has thousands.


@dataclasses.dataclass(frozen=True)
class Config:
  """Prompts to answer, and the model.

  Attributes:
    init_from: Model: the workdir of a finished run, RUN@STEP or RUN@best for one of its
      checkpoints, a Hugging Face folder or hf://ORG/NAME, also of adapters of PEFT.
    prompt: Prompt to answer; empty takes those of --data.eval_path or else of --data.path.
    limit: Maximum number of prompts; 0 answers all of --data.path, and 64 of the built-in task.
    batch_size: Prompts per call of the model.
  """

  init_from: str
  prompt: str = ""
  limit: int = 0
  batch_size: int = 16
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  reward: judges.RewardOptions = judges.RewardOptions()

  def __post_init__(self):
    ranges.check(self, at_least_one=("batch_size",), non_negative=("limit",))
    defaults.settle(self)


def generate(session: loop.Session, config: Config) -> list[dict[str, Any]]:
  """Samples responses, writes and shows them, and returns the rows that were written."""
  loop.require_no_steps(session)
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data)
  if config.prompt:
    prompts = data.from_prompts([config.prompt], tokenizer)
    data.require_known("--prompt", [prompts.examples[0]["prompt"]], tokenizer)
  else:
    prompts = given_rows.prompts(
      session,
      "Samples",
      config.data,
      tokenizer,
      config.reward.checks,
      limit=config.limit or (0 if data.is_given(config.data) else _BUILT_IN),
      every=True,
      model=folder,
    )
  limits.require_length(config, folder, answered=[prompts])
  with loop.open_run(session) as run:
    settings = flags.to_dict(config)
    known = loop.identity(run, "generate", settings, models.digests(flags.flatten(settings)))
    model, params = models.open_model(run, config.model, folder, tokenizer, frozen=True)
    params = sharding.make_reshard(run.mesh, model.config.dtype)(params)
    sample = models.make_sampler(model, tokenizer, config.sampling)
    reward_fn = None
    if config.reward.is_given:
      reward_fn = judges.open_reward(run, config.reward, config.model, tokenizer)(prompts)
    given = [{"prompt": config.prompt}]
    if not config.prompt:
      given = given_rows.prompt_columns(prompts)
    stops = models.stops(tokenizer, config.sampling)
    repeats = config.sampling.samples_per_prompt

    def lines_of(batch: data.PromptBatch, size: int) -> list[dict[str, Any]]:
      rollout = sample(params, *sharding.place_batch(batch, run.mesh), run.key_for(2))
      texts = rewards.response_texts(rollout, tokenizer.batch_decode)
      ids = np.repeat(batch.prompt_id, repeats)
      ended = sharding.to_host(generation.ended(rollout, *stops))
      values = {"logprob": sharding.to_host(rollout.logprobs.sum(axis=1))}
      if reward_fn is not None:
        reward = rewards.parts_of(reward_fn(rollout, ids))
        values |= sharding.to_host(rewards.columns(reward))
        if reward.satisfied is not None:
          values["satisfied"] = reward.satisfied
      lines = []
      for n, (i, text) in enumerate(zip(ids[:size].tolist(), texts, strict=False)):
        numbers = {name: float(column[n]) for name, column in values.items()}
        lines.append({**given[i], "response": text, "ended": bool(ended[n]), **numbers})
      return lines

    part = answering.unfinished(run, known, prompts.digest)
    rows = answering.answer(
      part,
      prompts,
      lines_of,
      repeats=repeats,
      batch_size=evaluating.heldout_batch_size(run, prompts, config.batch_size),
      pad_id=tokenizer.pad_id,
      title="generate",
    )
    reporting.save_samples(run.workdir, 0, rows)
    answering.finish(part)
    shown = [{"prompt": prompt_text(row), **row} for row in rows[:4]]
    shown = [{name: of[name] for name in of if name != "messages"} for of in shown]
    reporting.show_samples(shown, f"Samples of {config.init_from}")
    if cut := sum(not row["ended"] for row in rows):
      length = f"--sampling.max_new_tokens={config.sampling.max_new_tokens}"
      reporting.note(f"{cut} of {len(rows)} responses are cut at {length}: their `ended` is false")
    if reward_fn is not None:
      scores = {name: np.array([row[name] for row in rows]) for name in rows[0] if "reward" in name}
      named = {name.partition("/")[2]: x for name, x in scores.items() if name != "reward"}
      rewards.require(judges.name_of(reward_fn), scores["reward"], named)
  return rows


if __name__ == "__main__":
  entry.run_script(generate, loop.Session, Config)
