r"""Has a model criticise and revise its own responses (Constitutional AI).

The model answers prompts, criticises its answers by a list of principles, and
revises them:
  python -m experiments.revise --workdir=runs/cai --judge.path=FOLDER \
    --data.path=PROMPTS.jsonl
Fine-tune on the revisions:
  python -m experiments.sft --workdir=runs/sft --model.path=FOLDER \
    --data.path=runs/cai/revised.jsonl

Bai et al., 2022, https://arxiv.org/abs/2212.08073, section 3.1. Rows have a
`prompt` or `messages`; without a file they are those of the built-in task. Every
line of `revised.jsonl` has the prompt, the first `draft`, all `steps` of critique
and revision, and the final `response`. The same command, run again, resumes where
it was stopped.
"""

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax import data, entry, flags, loop, ranges, reporting
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from .annotation import revision
from .annotation.items import prompt_text
from .annotation.judge import CriticOptions, read_principles
from .lab import given_rows, limits, line_files, models

_REVISED = "revised.jsonl"


@dataclasses.dataclass(frozen=True)
class Config:
  """Prompts to answer, and the model.

  Attributes:
    limit: Maximum number of prompts to answer; 0 answers all.
    batch_size: Questions per call of the model.
    revisions: Rounds of critique and revision per response.
  """

  limit: int = 0
  batch_size: int = 8
  revisions: int = 1
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  judge: CriticOptions = CriticOptions()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=128)

  def __post_init__(self):
    ranges.check(self, non_negative=("limit",), at_least_one=("batch_size", "revisions"))
    if not self.judge.path:
      raise ValueError("judge.path is needed: the model that answers and revises")
    models.require_one_sample(self.sampling, "each prompt is answered once")


def revise(session: loop.Session, config: Config) -> dict[str, Any]:
  """Answers the prompts that are left and revises the answers; returns summary.json."""
  loop.require_no_steps(session)
  principles = read_principles(config.judge.principles)
  folder = models.model_folder(config.judge.path)
  tokenizer = models.open_tokenizer(folder, config.data)
  source = dataclasses.replace(config.data, eval_fraction=0.0)
  prompts, heldout = given_rows.read(session, "prompts", source, tokenizer)
  given_rows.show("Revision", source, prompts, heldout, model=folder)
  asked = revision.distinct_prompts(prompts)
  asked = asked[: config.limit or len(asked)]
  texts = [prompt_text(columns) for columns in asked]
  limits.require_length(config, folder, answered=[prompts])
  revision.require_length(config, folder, tokenizer, texts, principles)
  with loop.open_run(session) as run:
    settings = flags.to_dict(config)
    digests = models.digests(flags.flatten(settings)) | {"data": prompts.digest}
    loop.identify(run, "revise", settings, digests)
    model, params = models.open_model(run, config.model, folder, tokenizer, frozen=True)
    answer = revision.make_answer(run, model, params, tokenizer, config, folder)
    path = run.workdir / _REVISED
    done = len(line_files.read_lines(path))
    with reporting.Progress(len(asked), done, "revise") as progress:
      for start in range(done, len(asked), config.batch_size):
        part = asked[start : start + config.batch_size]
        given = data.given_prompts(part, prefer_messages=tokenizer.has_chat_template)
        drafts = responses = answer(given, start, 0)
        steps: list[list[dict[str, str]]] = [[] for _ in part]
        for n in range(config.revisions):
          chosen = choose(principles, session.seed, start, n, len(part))
          requests = [
            revision.CRITIQUE.format(prompt=prompt, response=response, principle=principle)
            for prompt, response, principle in zip(
              texts[start : start + len(part)], responses, chosen, strict=True
            )
          ]
          critiques = answer(requests, start, 2 * n + 1)
          wanted = [
            revision.REVISION.format(critique_request=request, critique=critique)
            for request, critique in zip(requests, critiques, strict=True)
          ]
          responses = answer(wanted, start, 2 * n + 2)
          for i, (principle, critique, response) in enumerate(
            zip(chosen, critiques, responses, strict=True)
          ):
            steps[i].append({"principle": principle, "critique": critique, "revision": response})
        rows = [
          # An empty revision is no demonstration; the draft is kept instead.
          {
            **columns,
            "response": response if response.strip() else draft,
            "draft": draft,
            "steps": of_prompt,
          }
          for columns, draft, response, of_prompt in zip(
            part, drafts, responses, steps, strict=True
          )
        ]
        line_files.append_lines(path, rows)
        progress.update(start + len(part))
    return report(run, line_files.read_lines(path))


def choose(principles: tuple[str, ...], seed: int, start: int, turn: int, count: int) -> list[str]:
  """Draws a random principle for each of `count` prompts from number `start` on."""
  draws = [np.random.default_rng([seed, start + i, turn]) for i in range(count)]
  return [principles[draw.integers(len(principles))] for draw in draws]


def report(run: loop.Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Shows the first rows and writes the share of changed responses; returns summary.json."""
  answers = [{name: row[name] for name in ("draft", "response")} for row in rows[:4]]
  shown = [{"prompt": prompt_text(row)} | of for row, of in zip(rows, answers, strict=False)]
  reporting.show_samples(shown, "Drafts and revisions")
  changed = float(np.mean([row["draft"] != row["response"] for row in rows]))
  summary = {"rows": len(rows), "changed": changed}
  reporting.write_summary(run.workdir, summary)
  return summary


if __name__ == "__main__":
  entry.run_script(revise, loop.Session, Config)
