"""Fine-tunes a policy on single responses with a thumb up or down: KTO.

Built-in task, from the SFT model (about two minutes on a laptop CPU):
  python -m experiments.kto --workdir=runs/kto --init_from=runs/sft
Your model and data (rows with prompt, response, label; or pairs, which count as two rows):
  python -m experiments.kto --workdir=runs/kto --init_from=FOLDER --data.path=FILE.jsonl \
    --optim.learning_rate=1e-6

The start is the reference; its log-probabilities are computed once per response. At the end the
policy and its start answer the held-out prompts; with --eval_every=50 the policy also does every 50
steps. The default learning rate suits the built-in task.
Starting the same command again continues a run that was stopped.
"""

import dataclasses

from experiments.lab import judges, models, training
from rlhf_jax import entry, loop
from rlhf_jax.algorithms import kto
from rlhf_jax.algorithms.kto import KTOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """KTO. `reward` is what the policies are judged by, if anything."""

  steps: int = 250
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  kto: KTOConfig = KTOConfig()
  optim: OptimConfig = OptimConfig(learning_rate=3e-4)
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  reward: judges.RewardOptions = judges.RewardOptions()


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the figures of summary.json."""
  return training.train_offline(
    session,
    config,
    config.kto,
    kind="unpaired",
    title="KTO",
    make_batch=kto.KTOBatch,
    reference=kto.reference_logprobs,
    row_figures=kto.row_figures,
    make_step=kto.make_kto_step,
  )


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
