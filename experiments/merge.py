r"""Merges models of one architecture: averages, interpolation with their start, task arithmetic.

Less forgetting: a fifth of the SFT model in the policy (a few seconds on a laptop CPU)
  python -m experiments.merge --workdir=runs/merged --base=runs/sft --models=runs/ppo \
    --weight_on_base=0.2
A weight for each third of the layers, lower to upper, given or learned:
  --weight_on_base=0.1,0.2,0.3
  --weight_on_base=0.2 --blocks.count=3
One reward model of several, with the same start (WARM):
  python -m experiments.merge --workdir=runs/rm --models=runs/rm_0,runs/rm_1,runs/rm_2
Task arithmetic, `base + sum of weight * (model - base)`; a negative weight unlearns:
  python -m experiments.merge --workdir=runs/both --base=runs/sft \
    --models=runs/helpful,runs/harmless --weights=0.7,0.5

The merged model is in `export/` of the workdir, a Hugging Face folder, which --init_from and
--reward.path open. Models can be merged if they were tuned from the same one: architecture,
vocabulary and kind are compared. Nothing is trained, but for --blocks.count, which learns the
weights on answers of the tuned model to --data. The front of reward against forgetting is a few
merges and one comparison, whose `nll` is the loss on demonstrations:
  for w in 0.2 0.4 0.6; do python -m experiments.merge --workdir=runs/merged_$w \
    --base=runs/sft --models=runs/ppo --weight_on_base=$w; done
  python -m experiments.evaluate --workdir=runs/front --baseline=runs/sft \
    --policy=runs/ppo,runs/merged_0.2,runs/merged_0.4,runs/merged_0.6
"""

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax import defaults, entry, flags, loop, processes, reporting
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import hf, merge
from . import records
from .lab import averaging, given_rows, limits, line_files, models


@dataclasses.dataclass(frozen=True)
class Config:
  """Models to merge.

  Attributes:
    models: Models, separated by commas: workdirs of finished runs, or Hugging Face folders.
    base: Model that they were tuned from; empty averages them.
    weight_on_base: Weight of the base, 1 minus that of the average of the models: a number, or one
      for each of several blocks of layers, lower to upper.
    weights: Weight of each model: its share of an average, or with a base the factor of its
      difference from the base. Empty makes all equal.
  """

  models: tuple[str, ...]
  base: str = ""
  weight_on_base: tuple[float, ...] = ()
  weights: tuple[float, ...] = ()
  model: models.ModelOptions = models.ModelOptions()
  blocks: averaging.BlockOptions = averaging.BlockOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))

  def __post_init__(self):
    defaults.settle(self)
    on_base = self.weight_on_base
    if self.model.frozen_dtype != "float32":
      raise ValueError("model.frozen_dtype does not apply: models are merged as they are stored")
    for name in ("weight_on_base", "weights"):
      if not np.isfinite(getattr(self, name)).all():
        raise ValueError(f"{name} must be finite numbers, got {[*getattr(self, name)]}")
    if len(self.models) + bool(self.base) < 2:
      raise ValueError("models must name two models or more, or one with a base")
    if self.base and not (on_base or self.weights):
      raise ValueError("base needs --weight_on_base, or --weights of the models")
    if on_base and not self.base:
      raise ValueError("weight_on_base is the weight of a base; give --base, or leave it out")
    if on_base and self.weights:
      raise ValueError("weights and --weight_on_base are both given; keep one")
    if self.blocks.count and len(on_base) != 1:
      raise ValueError(
        "blocks.count learns weights whose mean is --weight_on_base; give one number"
      )
    if self.weights and len(self.weights) != len(self.models):
      raise ValueError(
        f"weights has {len(self.weights)} numbers for {len(self.models)} models; give one for each"
      )
    if not self.base and (min(self.weights, default=1) < 0 or not sum(self.weights or (1,))):
      raise ValueError(
        "weights of an average are 0 or more, and one is above 0; a base allows others"
      )


def run_merge(session: loop.Session, config: Config) -> dict[str, Any]:
  """Merges the models, exports the result to `workdir/export` and returns summary.json."""
  loop.require_no_steps(session)
  paths = [*([config.base] if config.base else []), *config.models]
  line_files.short_names("models", paths)  # Refuses one that is given twice.
  folders, tokenizer = averaging.open_alike(paths, config.data)
  for folder in folders:
    models.require_other_folder(session.workdir, folder)
  layers = hf.parse_config(folders[0])[0].layers
  for name, blocks in (
    ("weight_on_base", len(config.weight_on_base)),
    ("blocks.count", config.blocks.count),
  ):
    if blocks > layers:
      raise flags.UsageError(f"--{name} gives {blocks} blocks to a model of {layers} layers")
  head = hf.parse_config(folders[0])[1]
  prompts = None
  if config.blocks.count:
    if head != "language":
      raise flags.UsageError("--blocks.count learns from answers, and a reward model gives none")
    prompts, _ = given_rows.read(session, "prompts", config.data, tokenizer)
    limits.require_length(config, folders[0], answered=[prompts])
  with loop.open_run(session) as run:
    digests = models.digests(flags.flatten(flags.to_dict(config)))
    records.identify(run, "merge", config, tokenizer, prompts, digests=digests)
    opened = [models.open_model(run, config.model, of, tokenizer, head) for of in folders]
    model, params = opened[0][0], [params for _, params in opened]
    summary: dict[str, Any] = {}
    if not config.base:
      merged = merge.average(params, config.weights)
    elif config.weights:
      merged = merge.add_tasks(params[0], params[1:], config.weights)
    else:
      base, tuned = params[0], merge.average(params[1:])
      weights = np.asarray(config.weight_on_base)
      if prompts is not None:
        weights, summary = averaging.learn_blocks(
          run, model, tokenizer, base, tuned, weights[0], prompts, config.blocks, config.sampling
        )
      summary |= {f"weight_on_base/{i}": float(weight) for i, weight in enumerate(weights)}
      merged = merge.interpolate(base, tuned, averaging.weight_by_path(weights, layers))
    label = hf.scalar_label(folders[0]) or "reward"
    models.export(run.workdir / models.EXPORT, merged, model, tokenizer, label, sources=folders)
    if summary:
      reporting.show_summary("Weights, and loss on answers of the tuned model", {"merged": summary})
    card = run.workdir, run.workdir / models.EXPORT, tokenizer, summary
    processes.agree(lambda: records.write_card(*card))
    reporting.write_summary(run.workdir, summary)
    reporting.note(f"model: {run.workdir / models.EXPORT}")
  return summary


if __name__ == "__main__":
  entry.run_script(run_merge, loop.Session, Config)
