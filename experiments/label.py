r"""Labels pairs of responses, by an AI judge or by a person in the terminal.

An AI judge compares each pair by a list of principles, in both orders, and gives
soft labels, under the last part of its path or --annotator:
  python -m experiments.label --workdir=runs/ai --judge.path=FOLDER \
    --data.path=PAIRS.jsonl
A person reads both responses and presses a, b, t (tie), s (skip), u (undo) or q
(quit):
  python -m experiments.label --workdir=runs/hand --annotator=ada \
    --data.path=PAIRS.jsonl
Train a model on the labels:
  python -m experiments.reward_model --workdir=runs/rm --init_from=runs/sft \
    --data.path=runs/hand/labels.jsonl
  python -m experiments.preference_model --workdir=runs/pm \
    --init_from=runs/sft --data.path=runs/ai/labels.jsonl --data.votes=each

A row is a pair (`prompt`, `chosen`, `rejected`) or has two `responses`, judged or
not. Without a file the rows are those of the built-in task. experiments.label_page
asks in the browser and takes up to nine responses; it can share the workdir.

Every answer is one line of `labels.jsonl`, on disk before the next question;
`labels.sqlite` is the database behind it. The final report has the agreement and
Cohen's kappa of every two annotators, and the position bias of a judge. The labels
in the rows count as an annotator. The same command, run again, resumes where it
was stopped.
"""

import dataclasses
import pathlib
from typing import Any

from rlhf_jax import entry, loop, ranges, rewards
from .annotation import agreement, judge, labels, terminal
from .annotation.items import check_annotator
from .annotation.judge import JudgeOptions
from .lab import limits, models


@dataclasses.dataclass(frozen=True)
class Config(labels.LabelConfig):
  """Pairs to label, and the annotator.

  Attributes:
    annotator: Name of the person who labels. With --judge.path the judge labels, and this is its
      name; empty takes the last part of the path.
    batch_size: Questions per call of the judge.
  """

  annotator: str = ""
  batch_size: int = 8
  model: models.ModelOptions = models.ModelOptions()
  judge: JudgeOptions = JudgeOptions()

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, at_least_one=("batch_size",))
    if not self.annotator and not self.judge.path:
      raise ValueError("annotator or judge.path says who labels; give one of the two")
    try:
      check_annotator(self.name)
    except ValueError as error:
      hint = "" if self.annotator else " as the last part of --judge.path; name the judge"
      raise ValueError(f"{error}{hint}") from error

  @property
  def name(self) -> str:
    """Name of the annotator, a person or a judge."""
    return self.annotator or pathlib.Path(self.judge.path).name or "judge"


def label(session: loop.Session, config: Config) -> dict[str, Any]:
  """Labels the pairs that are left, reports on all pairs, and returns summary.json."""
  loop.require_no_steps(session)
  with loop.open_run(session) as run:
    if not config.judge.path:
      labels.require_one_process()
    items, store = labels.open_labels(run, config)
    labels.require_pairs(items)
    metrics: dict[str, float] = {}
    if config.judge.path:
      principles = judge.read_principles(config.judge.principles)
      known_as = judge.fingerprint(config.judge, config.model, principles)
      store.require_same(config.name, known_as)
      model_judge = open_judge(run, config, principles)
      answered, canaries = store.answered(config.name), items[: config.judge.canaries]
      left = [item for item in items if item.id not in answered]
      lengths = judge.lengths(model_judge, left, canaries, config.batch_size)
      limits.require(config, models.model_folder(config.judge.path), lengths)
      judge.label(model_judge, store, items, config.name, known_as, config.batch_size)
      metrics |= agreement.position_metrics(items, store.rows(config.name))
      metrics |= judge.meet_canaries(model_judge, canaries)
    else:
      store.require_same(config.name)
      with terminal.single_keys():
        terminal.label(store, items, config.name)
    return labels.report(run, items, store, metrics)


def open_judge(run: loop.Run, config: Config, principles: tuple[str, ...]) -> rewards.JudgeModel:
  """Opens the judge of `--judge.path`."""
  folder = models.model_folder(config.judge.path)
  tokenizer = models.open_tokenizer(folder, config.data)
  model, params = models.open_model(run, config.model, folder, tokenizer, frozen=True)
  return rewards.JudgeModel(
    model.apply,
    params,
    tokenizer,
    principles,
    batch_size=config.batch_size,
    max_characters=config.judge.max_characters,
  )


if __name__ == "__main__":
  entry.run_script(label, loop.Session, Config)
