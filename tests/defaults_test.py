"""Defaults that depend on the model, from the command line to the record of a run."""

import dataclasses
import importlib
import json
import pathlib
import re

import pytest
from absl import flags as absl_flags

from experiments import dpo, ppo, rlhf, sft
from experiments.lab import critics, models, plans
from rlhf_jax import data, defaults, flags, simulation
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from tests.testing import read_configs

PAGE = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "README.md"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Model folders by kind: the built-in model as a run and as a folder, and somebody's."""
  root = tmp_path_factory.mktemp("models")
  data.word_level_tokenizer(simulation.WORDS).save(root / "run" / "export")
  data.word_level_tokenizer(simulation.WORDS).save(root / "builtin")
  data.word_level_tokenizer(["an", "other", "vocabulary"]).save(root / "words")
  new = {"script": "sft", "--init_from": "", "--model.path": "", "--model.preset": ""}
  starts = {"again": str(root / "begun@2"), "tuned": str(root / "words")}
  runs = {"begun": new, "scratch": new | {"--model.preset": "llama3_1b"}}
  runs |= {name: new | {"--init_from": start} for name, start in starts.items()}
  for name, identity in runs.items():
    (root / name).mkdir()
    (root / name / "identity.json").write_text(json.dumps(identity))
  (root / "empty").mkdir()
  (root / "broken").mkdir()
  (root / "broken" / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": 3}}')
  (root / "text").mkdir()
  (root / "text" / "tokenizer.json").write_text("{")
  return root


@pytest.mark.parametrize(
  "name, kind",
  [
    ("run", "built-in"),
    ("run/export", "built-in"),
    ("run@3", "built-in"),
    ("run@best", "built-in"),
    ("begun@3", "built-in"),
    ("again@best", "built-in"),
    ("scratch@3", "pretrained"),
    ("tuned@3", "pretrained"),
    ("words@3", "pretrained"),
    ("nowhere@3", "pretrained"),
    ("builtin", "built-in"),
    ("words", "pretrained"),
    ("empty", "pretrained"),
    ("broken", "pretrained"),
    ("text", "pretrained"),
    ("nowhere", "pretrained"),
  ],
)
def test_the_kind_of_a_model_is_that_of_its_folder(name, kind, folders):
  path = str(folders / name)
  assert defaults.kind_of(sft.Config(init_from=path)) == kind
  assert defaults.kind_of(sft.Config(model=models.ModelOptions(path=path))) == kind
  adapted = "built-in" if kind == "built-in" else "adapters"
  assert defaults.kind_of(sft.Config(init_from=path, lora=LoRAConfig(rank=2))) == adapted


def test_a_new_model_is_built_in_unless_it_has_a_published_size():
  assert defaults.kind_of(sft.Config()) == "built-in"
  of_file = sft.Config(data=data.DataConfig(path="rows.jsonl"))
  assert defaults.kind_of(of_file) == "built-in"
  preset = sft.Config(model=models.ModelOptions(preset="llama3_1b"))
  assert defaults.kind_of(preset) == "pretrained"
  assert defaults.kind_of(sft.Config(init_from="hf://org/model")) == "pretrained"


# What scripts that train nothing need, with the folder of a model.
ANSWERING = {
  "evaluate": lambda folder: {"policy": ("x",), "baseline": folder},
  "generate": lambda folder: {"init_from": folder},
  "merge": lambda folder: {"models": ("x",), "base": folder, "weights": (1.0,)},
}


@pytest.mark.parametrize("script", [*plans.methods(), *ANSWERING])
def test_no_script_has_the_rates_of_the_built_in_model_for_another(script, folders):
  cls = importlib.import_module(f"experiments.{script}").Config
  numbers = defaults.by_name(cls)
  assert numbers
  start = ANSWERING.get(script, lambda folder: {"init_from": folder})
  configs = [cls(**start(str(folders / name))) for name in ("words", "run")]
  if script not in ANSWERING:
    configs += [cls(**start(str(folders / "words")), lora=LoRAConfig(rank=2)), cls()]
  kinds = ("pretrained", "built-in", "adapters", "built-in")
  for config, kind in zip(configs, kinds, strict=False):
    flat = flags.flatten(flags.to_dict(config))
    for name, number in numbers.items():
      assert flat[name] == number.by_kind[kind]
      assert type(flat[name]) in (int, float)
    assert not {*numbers} & {*flags.changed(config)}, "a default counts as a change"
  for name, number in numbers.items():
    if name == "sampling.max_new_tokens":
      assert number.by_kind == {"built-in": 40, "pretrained": 256, "adapters": 256}
  rates = {n: x.by_kind for n, x in numbers.items() if isinstance(x, defaults.Rate)}
  assert ("optim.learning_rate" in rates) == (script not in ANSWERING)
  for of in rates.values():
    assert of["built-in"] > 10 * of["pretrained"]
    assert of["adapters"] == pytest.approx(10 * of["pretrained"])


def test_a_number_that_is_given_stays(folders):
  given = OptimConfig(learning_rate=3e-3)
  for start in ("words", "run"):
    config = ppo.Config(
      init_from=str(folders / start), optim=given, critic=critics.CriticOptions(learning_rate=1e-3)
    )
    assert config.optim.learning_rate == 3e-3
    assert config.critic.learning_rate == 1e-3
  # A config that is made from another one keeps the numbers of the other one.
  new = dataclasses.replace(sft.Config(), init_from=str(folders / "words"))
  assert new.optim.learning_rate == 3e-3


@pytest.mark.parametrize(
  "words, rate, length",
  [
    ([], 3e-4, 40),
    (["--init_from={builtin}"], 3e-4, 40),
    (["--init_from={words}"], 1e-6, 256),
    (["--model.path={words}"], 1e-6, 256),
    (["--init_from={words}", "--lora.rank=4"], 1e-5, 256),
    (["--init_from={words}", "--optim.learning_rate=3e-4"], 3e-4, 256),
    (["--init_from={builtin}", "--optim.learning_rate=1e-6"], 1e-6, 40),
    (["--init_from={words}", "--sampling.max_new_tokens=40"], 1e-6, 40),
  ],
)
def test_flags_hold_the_numbers_of_the_model(words, rate, length, folders, tmp_path):
  paths = {name: folders / name for name in ("builtin", "words")}
  words = [f"--workdir={tmp_path}", *(word.format(**paths) for word in words)]
  values = absl_flags.FlagValues()
  read = [flags.define(cls, flag_values=values) for cls in (dpo.loop.Session, dpo.Config)]
  flags.parse(["dpo", *words], values)
  for _ in range(2):  # Reading changes nothing.
    _, config = [one() for one in read]
    assert config.optim.learning_rate == rate
    assert config.sampling.max_new_tokens == length
  assert values["optim.learning_rate"].value == rate
  flags.save_flags(tmp_path / "flags", values)
  lines = (tmp_path / "flags").read_text().splitlines()
  assert f"--optim.learning_rate={rate}" in lines
  # The file repeats the numbers, whatever becomes of the folder.
  _, again = read_configs("experiments.dpo", [f"--flagfile={tmp_path / 'flags'}"])
  assert again.optim.learning_rate == rate


def test_help_says_both():
  values = absl_flags.FlagValues()
  flags.define(ppo.Config, flag_values=values)
  text = values["optim.learning_rate"].help
  assert values["optim.learning_rate"].default == 1e-3
  assert "Default for a pretrained model: 1e-06, for adapters 1e-05." in text
  assert values["sampling.max_new_tokens"].help.endswith("Default for a pretrained model: 256.")


@pytest.mark.parametrize(
  "rate, warned", [(None, False), (1e-5, False), (6e-4, False), (6.1e-4, True), (3e-3, True)]
)
def test_a_rate_far_above_the_default_is_a_warning(rate, warned, folders):
  optim = {} if rate is None else {"optim": OptimConfig(learning_rate=rate)}
  lines = defaults.describe(sft.Config(init_from=str(folders / "words"), **optim))
  assert ("WARNING" in lines) == warned
  if rate is None:
    assert lines == {"learning rate": "2e-05, the default for a pretrained model"}
  else:
    assert lines["learning rate"].endswith("the default for a pretrained model is 2e-05")
  if rate == 3e-3:
    assert lines["WARNING"] == (
      "--optim.learning_rate=0.003 is 150 times the default for a pretrained model"
    )
  assert "WARNING" not in defaults.describe(sft.Config())


def test_the_chain_is_of_the_built_in_model(folders):
  for stage in (
    sft.Config(init_from=str(folders / "words")),
    sft.Config(model=models.ModelOptions(path=str(folders / "words"))),
  ):
    with pytest.raises(ValueError, match=r"^sft\.(init_from|model\.path) is empty here"):
      rlhf.Config(sft=stage)


def test_the_table_of_the_page_is_that_of_the_scripts():
  row = r"^\| ((?:`\w+`,? ?)+)(critic)? *\|([^|]*)\|([^|]*)\|([^|]*)\|"
  rows = re.findall(row, PAGE.read_text(encoding="utf-8"), re.M)
  known = {}
  for scripts, critic, *numbers in rows:
    try:
      rates = [float(number) for number in numbers]
    except ValueError:  # Another table.
      continue
    name = "critic.learning_rate" if critic else "optim.learning_rate"
    known |= {(script, name): rates for script in re.findall(r"\w+", scripts)}
  expected = {
    (script, name): list(number.by_kind.values())
    for script in plans.methods()
    for name, number in defaults.by_name(plans.script_of(script).Config).items()
    if isinstance(number, defaults.Rate)
  }
  assert known == expected
