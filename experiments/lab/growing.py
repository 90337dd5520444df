"""The Grow step of ReST: samples and scores responses into a file that survives a kill."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, flags, generation, loop, plots, reporting, rewards, sharding
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.rewards import shaped
from . import answering, evaluating, judges, limits, line_files, models

GROWN = "responses.jsonl"
SETTINGS = ("sampling", "reward", "preference", "shaping")


class Grown(NamedTuple):
  """Sampled and scored responses, N to each of P prompts.

  Attributes:
    rows: P * N rows of the file; those of a prompt are adjacent.
    rewards: [P, N] float32, shaped scores, NaN where they are unusable.
    satisfied: [P, N] bool, True on responses that violate no constraint; None without constraints.
  """

  rows: list[dict[str, Any]]
  rewards: np.ndarray
  satisfied: np.ndarray | None = None


def take_prompts(dataset: data.Dataset, step: int, count: int) -> data.Dataset:
  """Takes the next `count` prompts for a Grow step, starting over after the last prompt.

  Raises:
    UsageError: The prompts have weights by their files.
  """
  if dataset.mixture:
    raise flags.UsageError(
      "--data.path gives weights to files, and Grow steps take each prompt in turn; leave them out"
    )
  size = len(dataset.examples)
  chosen = [(step * count + i) % size for i in range(min(count, size))]
  return dataset._replace(
    examples=[dataset.examples[i] for i in chosen], rows=[dataset.rows[i] for i in chosen]
  )


def grow(
  session: loop.Session,
  config: Any,
  start: pathlib.Path,
  reference: pathlib.Path,
  tokenizer: data.Tokenizer,
  prompts: data.Dataset,
) -> Grown:
  """Samples and scores the responses that are not in the file yet; returns all, in order.

  Args:
    session: Workdir, seed and devices of the Grow step.
    config: Config of the script: `sampling`, `reward`, `preference`, `shaping` and `model`.
    start: Folder of the policy that samples.
    reference: Folder of the reference policy, for `shaping`.
    tokenizer: Tokenizer of both policies.
    prompts: Prompts to sample responses to.
  """
  count = config.sampling.samples_per_prompt
  wanted = len(prompts.examples) * count
  limits.require_length(config, start, answered=[prompts])
  with loop.open_run(session) as run:
    settings = {name: flags.to_dict(config)[name] for name in SETTINGS}
    settings["start"] = str(start)
    if config.shaping.function:
      settings["reference"] = str(reference)
    digests = models.digests(flags.flatten(settings))
    digests |= {"data": prompts.digest, "tokenizer": tokenizer.digest}
    loop.identify(run, "grow", settings, digests)
    path = run.workdir / GROWN
    done = line_files.read_lines(path)
    if len(done) < wanted:
      done = _sample(run, config, start, reference, tokenizer, prompts, path)
  moments, ref_scores = RunningMoments.zero(), None
  if config.shaping.function:
    ref_scores = jnp.asarray(_scores(done, "reference_scores"))
  scores, ended = jnp.asarray(_scores(done)), jnp.asarray([row["ended"] for row in done])
  shaped_scores, _ = shaped.shape(scores, ended, moments, config.shaping, ref_scores)
  satisfied = None
  if config.reward.constraints:
    satisfied = np.asarray([row["satisfied"] for row in done]).reshape(-1, count)
  return Grown(done, np.asarray(shaped_scores).reshape(-1, count), satisfied)


def _or_none(score: float) -> float | None:
  """Returns a score as JSON has it: None for NaN."""
  return None if np.isnan(score) else float(score)


def _scores(rows: Sequence[Mapping[str, Any]], column: str = "score") -> np.ndarray:
  """Returns a column of scores, NaN for None."""
  return np.asarray([row[column] for row in rows], np.float32)


def _sample(
  run: loop.Run,
  config: Any,
  start: pathlib.Path,
  reference: pathlib.Path,
  tokenizer: data.Tokenizer,
  prompts: data.Dataset,
  path: pathlib.Path,
) -> list[dict[str, Any]]:
  """Samples the rows that are not in the file yet, and returns all."""
  count = config.sampling.samples_per_prompt
  model, params = models.open_model(run, config.model, start, tokenizer)
  reshard = sharding.make_reshard(run.mesh, model.config.dtype)
  params, stops = reshard(params), models.stops(tokenizer, config.sampling)
  generate = models.make_sampler(model, tokenizer, config.sampling)
  reward_fn = judges.open_scores(run, config, tokenizer).score_of(prompts)
  watch = judges.watch(reward_fn)
  sample_reference, ref_params, others = None, None, config.shaping.reference_samples
  if config.shaping.function:
    sampling = dataclasses.replace(config.sampling, samples_per_prompt=others)
    sample_reference = models.make_sampler(model, tokenizer, sampling)
    _, ref_params = models.open_model(run, config.model, reference, tokenizer, frozen=True)
    ref_params = reshard(ref_params)

  def lines_of(batch: data.PromptBatch, size: int) -> list[dict[str, Any]]:
    placed, ids = sharding.place_batch(batch, run.mesh), np.repeat(batch.prompt_id, count)
    rollout = generate(params, *placed, run.key_for(0))
    ended = generation.ended(rollout, *stops)
    reward = rewards.parts_of(reward_fn(rollout, ids))
    scored = (rewards.total(reward), ended, rollout.tokens, rollout.response_mask)
    scores, ended, tokens, mask = sharding.to_host(scored)
    watch.check(scores[:size], {name: x[:size] for name, x in (reward.named or {}).items()})
    answers = [row[on].tolist() for row, on in zip(tokens, mask, strict=True)]
    lines = [
      {
        "prompt": prompts.rows[ids[n]]["prompt_text"],
        "response": text,
        "score": _or_none(scores[n]),
        "ended": bool(ended[n]),
        "sample": n % count,
        "prompt_tokens": prompts.examples[ids[n]]["prompt"].tolist(),
        "tokens": answers[n],
      }
      for n, text in enumerate(tokenizer.batch_decode(answers)[:size])
    ]
    if reward.satisfied is not None:
      for line, satisfied in zip(lines, reward.satisfied, strict=False):
        line["satisfied"] = bool(satisfied)
    if sample_reference is not None:
      answered = sample_reference(ref_params, *placed, run.key_for(1))
      compared = rewards.total(reward_fn(answered, np.repeat(batch.prompt_id, others)))
      compared = np.asarray(sharding.to_host(compared)).reshape(-1, others)
      for n, line in enumerate(lines):
        line["reference_scores"] = [_or_none(score) for score in compared[n // count]]
    return lines

  written = answering.answer(
    path,
    prompts,
    lines_of,
    repeats=count,
    batch_size=evaluating.heldout_batch_size(run, prompts, max(128 // count, 1)),
    pad_id=tokenizer.pad_id,
    title="grow",
    metrics_of=lambda lines: {"reward/mean": float(np.nanmean(_scores(lines)))},
  )
  scores = _scores(written)
  summary = {"responses": len(scores), "reward/mean": float(np.nanmean(scores))}
  if config.reward.constraints:
    summary["reward/violations"] = 1 - float(np.mean([row["satisfied"] for row in written]))
  reporting.write_summary(run.workdir, summary)
  return written


def kept_examples(grown: Grown, weights: np.ndarray) -> tuple[data.Dataset, np.ndarray]:
  """Turns grown responses of positive weight [P, N] into demonstrations; returns weights too."""
  places = np.flatnonzero(weights.ravel() > 0)
  examples = [
    {
      "prompt": np.asarray(grown.rows[i]["prompt_tokens"], np.int32),
      "response": np.asarray(grown.rows[i]["tokens"], np.int32),
    }
    for i in places
  ]
  rows = [{"prompt_text": grown.rows[i]["prompt"], **grown.rows[i]} for i in places]
  kept = data.from_examples("demonstrations", examples, rows)
  return kept, weights.ravel()[places].astype(np.float32)


def draw(workdir: pathlib.Path, rows: list[dict[str, float]], improve_steps: int) -> None:
  """Draws `plots/quality.png`: rewards of grown and kept responses, and held-out rewards."""
  steps = np.arange(1, len(rows) + 1)

  def line(label: str, name: str) -> plots.Line:
    return plots.Line(label, steps, np.asarray([row[name] for row in rows]))

  quality = [line("Grown", "grown_reward/mean"), line("Kept", "kept_reward/mean")]
  if "eval/reward/mean" in rows[0]:
    quality.append(line("Policy after the step (held out)", "eval/reward/mean"))
  xlabel = f"Improve step ({improve_steps} per Grow step)"
  plots.save_chart(
    workdir / "plots" / "quality.png",
    plots.Chart("Quality of the data", xlabel, "Mean reward", lines=quality),
    plots.Chart(
      "Share of the grown responses that was kept",
      xlabel,
      "Share",
      lines=[line("Kept", "kept_share")],
    ),
  )
