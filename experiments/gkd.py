r"""Distils a teacher into a student on the student's own responses (GKD).

Built-in task: a student of half the width learns from the policy of PPO (two minutes on a laptop
CPU):
  python -m experiments.sft --workdir=runs/small --model.width=64 --model.heads=2 \
    --model.mlp_width=128
  python -m experiments.gkd --workdir=runs/gkd --init_from=runs/small --teacher=runs/ppo
Your models, of one vocabulary, and prompts:
  python -m experiments.gkd --workdir=runs/gkd --init_from=FOLDER --teacher=LARGER \
    --data.path=PROMPTS.jsonl
Supervised distillation: only the teacher answers, so that a new model can learn too:
  --gkd.student_share=0 --gkd.divergence=forward_kl

A teacher of another vocabulary can only be imitated in its answers (sequence-level distillation):
  python -m experiments.generate --workdir=runs/answers --init_from=LARGER \
    --data.path=PROMPTS.jsonl
  python -m experiments.sft --workdir=runs/student --init_from=FOLDER \
    --data.path=runs/answers/samples/step_00000000.jsonl

Both read prompts in the chat template of the student. At the end the trained and the initial
student answer the held-out prompts; on the built-in task the teacher does, too. The same command,
run again, resumes a run that was stopped.
"""

import dataclasses
import functools
import math

from rlhf_jax import defaults, entry, flags, loop
from rlhf_jax.algorithms import gkd
from rlhf_jax.algorithms.gkd import GKDConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import Model
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from rlhf_jax.types import TrainState
from .lab import models, responses, teachers, training, workbench
from .lab.case import Case


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """GKD. `batch_size` counts prompts; each step samples responses and makes one update.

  Attributes:
    teacher: Workdir or Hugging Face folder of the teacher, of any size, with the vocabulary of the
      student.
  """

  steps: int = 120
  batch_size: int = 64
  checkpoint_every: int = 20
  teacher: str = ""
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  gkd: GKDConfig = GKDConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-5), schedule="linear")
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self)

  def require(self) -> None:
    """Refuses a config without a teacher, and a student that cannot answer yet."""
    if not self.teacher:
      raise flags.UsageError(
        "--teacher is needed: the workdir or folder of the model to learn from"
      )
    if self.gkd.student_share and not (self.init_from or self.model.path):
      raise flags.UsageError(
        "--init_from is needed: a student that nothing has trained samples noise; or set"
        " --gkd.student_share=0, to learn from responses of the teacher"
      )


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the student to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  with workbench.open(session, config, "gkd", "prompts") as bench:
    teacher = teachers.open_teacher(bench)
    trainer = make_trainer(bench, teacher.model)
    bench.describe("GKD", trainer, teacher=config.teacher)
    respond = teachers.make_respond(bench, teacher)

    def iteration(state: TrainState, prompts, key):
      rollout, metrics = respond(trainer.params(state), prompts, state.step, key)
      state, of_update = trainer.step(state, rollout, teacher.params, key)
      if not metrics["student_share"]:
        of_update["kl/teacher"] = math.nan  # These are responses of the teacher.
      return state, metrics | of_update

    judge = bench.judge(batch_size=config.batch_size * config.sampling.samples_per_prompt)
    state = bench.fit(
      iteration,
      trainer,
      bench.batches(),
      evaluate=judge.evaluate(trainer.params) if config.eval_every else None,
    )
    of_teacher = teachers.heldout_rewards(bench, teacher)
    return judge.finish(trainer.params(state), config.steps, "GKD", of_teacher)


def make_trainer(bench: workbench.Workbench, teacher: Model) -> training.Trainer:
  """Builds the state and the step of the student."""
  make_step = functools.partial(
    gkd.make_gkd_step,
    config=bench.config.gkd,
    teacher_apply_fn=teacher.apply,
    temperature=bench.config.sampling.temperature,
  )
  return bench.trainer(make_step, teacher=teacher)


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  teacher = teachers.open_teacher(case.bench)
  teachers.programs(case, teacher, make_trainer(case.bench, teacher.model))


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
