"""Answers that a model revises, and flags that are refused."""

import dataclasses
import json

import jax
import pytest

from experiments import revise
from experiments.annotation.judge import CriticOptions
from rlhf_jax import data, flags, loop, simulation
from rlhf_jax.data import DataConfig
from rlhf_jax.models import ModelConfig, build, hf
from tests.data import chats
from tests.data.rows import text, write
from tests.testing import read_flags


@pytest.mark.slow
def test_a_model_revises_its_answers(tmp_path, run_script, shared):
  model = shared / "models" / "stories260k"
  prompts = tmp_path / "prompts.jsonl"
  rows = simulation.preferences("eval", 24, 0)
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  words = (
    f"--judge.path={model}",
    "--data.end_token=<s>",
    f"--data.path={prompts}",
    "--sampling.max_new_tokens=12",
    "--revisions=2",
    "--batch_size=2",
    "--limit=4",
  )
  finished = run_script("revise", tmp_path / "out", *words)
  assert finished.code == 0, finished.output
  path = tmp_path / "out" / "revised.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert len({row["prompt"] for row in rows}) == 4
  for row in rows:
    assert [set(step) for step in row["steps"]] == [{"principle", "critique", "revision"}] * 2
    assert row["response"] in (row["steps"][-1]["revision"], row["draft"])
  # What was killed after the first two rows is continued with the same ones.
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:2]))
  again = run_script("revise", tmp_path / "out", *words)
  assert again.code == 0, again.output
  assert path.read_text() == "".join(lines)


def turn(role, content):
  return {"role": role, "content": content}


TALK = [turn("user", text(1)), turn("assistant", text(2)), turn("user", text(3))]
SHORT = turn("system", text(4))
ASKED = [turn("user", text(8))]
# Columns of a row, and what a model with the chat template, and one without, is asked.
ROWS = [
  ({"messages": [SHORT, *TALK]}, [SHORT, *TALK], [SHORT, *TALK]),
  (
    {"prompt": text(5), "system": text(4)},
    [SHORT, turn("user", text(5))],
    text(4) + "\n\n" + text(5),
  ),
  ({"prompt": text(3), "history": [[text(1), text(2)]]}, TALK, TALK),
  ({"messages": [*ASKED, turn("assistant", text(6))]}, ASKED, ASKED),  # The answer is left out.
  ({"prompt": text(7)}, text(7), text(7)),
]


@pytest.mark.parametrize("template", ["chatml", None])
def test_a_model_is_asked_the_turns_of_a_row_and_its_revisions_keep_them(
  tmp_path, monkeypatch, template
):
  tokenizer = chats.chat(chats.byte_level(), template)
  folder = tmp_path / "model"
  tokenizer.save(folder)
  config = ModelConfig(tokenizer.vocab_size, width=8, layers=1, heads=2, kv_heads=1, head_dim=4)
  params = build(config).init(jax.random.key(0))
  hf.save_folder(folder, params, config, token_ids={"eos_token_id": tokenizer.eos_id})
  asked = []

  def make_answer(*unused):
    def answer(prompts, number, turn):
      asked.extend(prompts if turn == 0 else ())
      return ["an answer"] * len(prompts)

    return answer

  monkeypatch.setattr(revise.revision, "make_answer", make_answer)
  rows = [columns for columns, *_ in ROWS]
  source = DataConfig(path=write(tmp_path, [*rows, rows[0]]))
  options = revise.Config(data=source, judge=CriticOptions(str(folder)))
  revise.revise(loop.Session(str(tmp_path / "out")), options)
  assert asked == [of[0 if template else 1] for _, *of in ROWS]

  # What is fine-tuned on the revisions reads what the model was asked.
  revised = DataConfig(path=f"{tmp_path}/out/revised.jsonl", eval_fraction=0.0)
  tuned, _ = data.load("demonstrations", revised, tokenizer)
  given, _ = data.load("prompts", dataclasses.replace(source, eval_fraction=0.0), tokenizer)
  for example, wanted in zip(tuned.examples, given.examples, strict=False):
    assert example["prompt"].tolist() == wanted["prompt"].tolist()
  assert len(tuned.examples) == len(ROWS)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "--judge.path is needed"),
    (["--judge.path=x", "--revisions=0"], "--revisions must be at least 1"),
    (["--judge.path=x", "--batch_size=0"], "--batch_size must be at least 1"),
    (["--judge.path=x", "--limit=-1"], "--limit must not be negative"),
  ],
)
def test_flags_that_are_refused(words, message):
  with pytest.raises(flags.UsageError, match=message):
    read_flags("experiments.revise", ["--workdir=x", *words])
