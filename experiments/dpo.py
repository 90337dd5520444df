r"""Fine-tunes a policy directly on preference pairs: DPO and related losses.

Built-in task, from the SFT model (two minutes on a laptop CPU; win rate about 0.7):
  python -m experiments.dpo --workdir=runs/dpo --init_from=runs/sft
Your model and data (rows with prompt, chosen, rejected), with another loss:
  python -m experiments.dpo --workdir=runs/dpo --init_from=FOLDER --data.path=FILE.jsonl \
    --dpo.loss=ipo --data.packed_length=1024
Offline VPO, whose bonus stays near the chosen responses:
  --dpo.bonus_coef=-0.01
A loss from your file my_losses.py in the current folder:
  --dpo.loss=my_losses:squared

The initial policy is the reference; its log-probabilities are computed once per pair. The prompt of
a pair is run once for both responses where this saves tokens; with --data.packed_length a row holds
as many pairs as fit, instead of one pair and padding.
At the end the trained and the initial policy answer the held-out prompts. With --eval_every=50 the
policy in training also answers them every 50 steps.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import dpo, pairs
from rlhf_jax.algorithms.dpo import DPOBatch, DPOConfig
from rlhf_jax.algorithms.pairs import PairConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from .lab import evaluating, models, training, workbench
from .lab.case import Case
from .lab.judges import RewardOptions


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """DPO on pairs. `reward`, if given, judges the policies at the end."""

  steps: int = 250
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig(share_prompts=True)
  reward: RewardOptions = RewardOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  dpo: DPOConfig = DPOConfig()
  pairs: PairConfig = PairConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(3e-4, 1e-6))
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    models.require_one_sample(self.sampling, "held-out prompts are answered once")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  with workbench.open(session, config, "dpo", "preferences") as bench:
    trainer, read = make_trainer(bench), pairs.make_read_pairs(bench.model.apply, config.pairs)
    bench.describe(
      "DPO",
      trainer,
      tokens_per_step=training.step_tokens(config, bench.train_set),
    )
    refs, heldout_refs = bench.references(make_ref_logprobs(bench))

    @jax.jit
    def summarize(policy, refs):
      rows = dpo.row_metrics(policy, refs, config=config.dpo)
      return pairs.mean_metrics(*rows, policy.real)

    judge = bench.later_judge()
    evaluate = bench.evaluator(trainer, jax.jit(read), summarize, judge, heldout_refs)
    state = bench.fit(
      lambda state, batch, key: trainer.step(state, DPOBatch(*batch), key),
      trainer,
      bench.batches(columns=refs, packed_length=config.data.packed_length),
      evaluate=evaluate,
    )
    summary = evaluate(state, config.steps) | evaluating.length_baseline(bench.heldout)
    return judge().finish(trainer.params(state), config.steps, "DPO", summary)


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  config = bench.config
  make_step = functools.partial(dpo.make_dpo_step, config=config.dpo, weighting=config.pairs)
  return bench.trainer(make_step)


def make_ref_logprobs(bench: workbench.Workbench) -> Callable[..., jax.Array]:
  """Jitted `(params, rows) -> [B, 2]`, log-probabilities of pairs under the reference."""
  read = pairs.make_read_pairs(bench.model.apply, bench.config.pairs)
  return jax.jit(lambda params, rows: read(params, rows).totals)


def programs(case: Case) -> None:
  """Compiles the forward pass of the reference and the train step, for `experiments.compile`."""
  rows = case.pairs()
  case.against_reference(make_trainer(case.bench), make_ref_logprobs(case.bench), rows, DPOBatch)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
