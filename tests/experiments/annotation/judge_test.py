"""Judges that are told apart by all that their verdicts depend on, and what they can read."""

import dataclasses
import json

import jax
import pytest

from experiments import label, label_studio
from experiments.annotation import judge, labels, page
from experiments.annotation.judge import JudgeOptions
from experiments.lab import models
from rlhf_jax import data, flags, loop, workdir
from rlhf_jax.models import build, hf
from tests.inputs.refused import refusal
from tests.testing import FAMILY_MODELS, read_configs, read_flags

WORDS = ("1", "2", "good", "bad", "Which", "response", "is", "better?")
PAIRS = [{"prompt": f"good {i}", "chosen": "good good", "rejected": "bad"} for i in range(5)]


@pytest.fixture
def make_judge(tmp_path):
  """`make_judge(name, seed=0, family="qwen2", max_length=512) -> folder` of a language model."""

  def make(name, seed=0, family="qwen2", max_length=512):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    tokenizer = data.word_level_tokenizer(WORDS)
    tokenizer.save(folder)
    config = dataclasses.replace(
      FAMILY_MODELS[family], vocab_size=tokenizer.vocab_size, max_length=max_length
    )
    params = jax.jit(build(config, "language").init)(jax.random.key(seed))
    hf.save_folder(folder, params, config, token_ids={"eos_token_id": tokenizer.eos_id})
    return folder

  return make


@pytest.fixture
def ask(tmp_path):
  """`ask(folder, annotator="", limit=0, model=..., **options) -> summary` of a judge."""
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

  def ask(folder, annotator="", limit=0, model=models.ModelOptions(), **options):
    config = label.Config(
      annotator=annotator,
      limit=limit,
      model=model,
      data=data.DataConfig(path=str(path)),
      judge=JudgeOptions(**{"path": str(folder), **options}),
    )
    return label.label(loop.Session(str(tmp_path / "out")), config)

  return ask


def answers(tmp_path):
  return [json.loads(line) for line in (tmp_path / "out" / "labels.jsonl").read_text().splitlines()]


def test_another_judge_under_a_name_is_refused(tmp_path, make_judge, ask):
  one, other = make_judge("seed_0/sft", 0), make_judge("seed_1/sft", 1)
  principles = tmp_path / "principles.txt"
  principles.write_text("Which response is better?\n")
  ask(one, limit=2)
  ask(one, limit=3)  # It goes on where it was.
  before = answers(tmp_path)
  assert [row["by"] for row in before] == ["sft"] * 3
  words = r"--workdir=.*out has answers of 'sft', who is a judge with another model, .*--annotator"
  for folder, changes in (
    (other, {}),
    (one, {"principles": str(principles)}),
    (one, {"max_characters": 10}),
    (one, {"model": models.ModelOptions(dtype="bfloat16")}),
  ):
    with pytest.raises(workdir.WorkdirError, match=words):
      ask(folder, **changes)
  assert answers(tmp_path) == before

  summary = ask(other, "second", principles=str(principles))
  assert [row["by"] for row in answers(tmp_path)] == ["sft"] * 3 + ["second"] * 5
  assert "kappa/sft/second" in summary and "position_bias" in summary
  # Where a model lies does not change its verdicts, nor do questions at a time.
  one.rename(tmp_path / "seed_0" / "moved")
  ask(tmp_path / "seed_0" / "moved", "sft")
  assert len(answers(tmp_path)) == 10


def test_a_person_and_a_judge_do_not_share_a_name(tmp_path, make_judge, ask, monkeypatch, capsys):
  folder = make_judge("ada")
  ask(folder, limit=2)
  session, source = loop.Session(str(tmp_path / "out")), str(tmp_path / "pairs.jsonl")
  config = label.Config(annotator="ada", data=data.DataConfig(path=source))
  monkeypatch.setattr(judge, "label", None)
  code, said = refusal(label.label, session, config)
  assert code == 78 and "answers of 'ada', who is a judge; give another --annotator" in said

  desk = page.Desk(*label_items(tmp_path))
  with pytest.raises(workdir.WorkdirError, match="who is a judge"):
    desk.ask("ada")

  chosen = {"type": "pairwise", "value": {"selected": "left"}}
  columns = {"prompt": "p", "answer1": "x", "answer2": "y"}
  annotation = {"completed_by": {"email": "ada"}, "result": [chosen]}
  export = tmp_path / "export.json"
  export.write_text(json.dumps([{"id": 99, "data": columns, "annotations": [annotation]}]))
  exchanged = label_studio.Config(data=data.DataConfig(path=source), answers=str(export))
  code, said = refusal(label_studio.exchange, session, exchanged)
  assert code == 78 and "answers of 'ada', who is a judge" in said
  assert len(answers(tmp_path)) == 2

  bob = desk.press(desk.ask("bob"), "a")
  assert bob.annotator == "bob"
  with pytest.raises(workdir.WorkdirError, match="'bob', who is a person"):
    ask(folder, "bob")


def label_items(tmp_path):
  config = labels.LabelConfig(data=data.DataConfig(path=str(tmp_path / "pairs.jsonl")))
  with loop.open_run(loop.Session(str(tmp_path / "out"))) as run:
    return labels.open_labels(run, config)


@pytest.mark.parametrize(
  "path", ["runs/label", "runs/my model", "runs/..", "runs/{}".format("x" * 65)]
)
def test_a_folder_whose_name_is_no_name_needs_one(path):
  with pytest.raises(flags.UsageError, match="--annotator must .*the last part of --judge.path"):
    read_flags("experiments.label", ["--workdir=x", f"--judge.path={path}"])
  words = ["--workdir=x", f"--judge.path={path}", "--annotator=m"]
  _, config = read_configs("experiments.label", words)
  assert config.name == "m"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_principles_of_another_encoding_are_refused(tmp_path, encoding):
  path = tmp_path / "principles.txt"
  path.write_text("Ist es schön?\nIs it true?\n", encoding=encoding)
  code, said = refusal(judge.read_principles, str(path))
  assert code == 64 and said.startswith(f"--judge.principles={path} ")
  assert "save the file as UTF-8" in said
  path.write_text("Ist es schön?\r\n\r\nIs it true?\r\n", encoding="utf-8-sig", newline="")
  assert judge.read_principles(str(path)) == ("Ist es schön?", "Is it true?")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_questions_beyond_the_positions_of_a_judge(tmp_path, make_judge, ask, family):
  folder = make_judge("judge", family=family, max_length=32)
  with pytest.raises(
    flags.UsageError, match="made for 32 tokens .*lower --judge.max_char"
  ) as error:
    ask(folder)
  assert str(folder) in str(error.value)
  assert ("--model.extrapolate" in str(error.value)) == (family == "qwen2")
  assert answers(tmp_path) == []
  if family == "qwen2":
    ask(folder, model=models.ModelOptions(extrapolate=True))
    assert len(answers(tmp_path)) == len(PAIRS)


def test_canaries_are_questions_too(make_judge, ask):
  lengths = []
  for canaries in (0, 1):
    with pytest.raises(flags.UsageError, match="the longest sequence has") as error:
      ask(make_judge(f"small{canaries}", max_length=32), canaries=canaries)
    lengths.append(int(str(error.value).split("has ")[1].split(";")[0]))
  assert lengths[0] < lengths[1]
  fitting = make_judge("fitting", max_length=lengths[0])
  with pytest.raises(flags.UsageError, match="--judge.max_characters"):
    ask(fitting, canaries=1)
  assert "canary/empty" in ask(make_judge("larger", max_length=lengths[1]), canaries=1)
  assert "position_bias" in ask(fitting)
