import dataclasses
import importlib
import json
import pathlib
from typing import Any, Literal

import pytest
from absl import app
from absl import flags as absl_flags
from absl.testing import flagsaver

from rlhf_jax import flags, loop, ranges


@dataclasses.dataclass(frozen=True)
class Common:
  """Settings of every script.

  Attributes:
    seed: Random seed.
    steps: Number of updates, of which every
      one counts: warm-up too.

  And more.
  """

  seed: int = 0
  steps: int = 10


@dataclasses.dataclass(frozen=True)
class DPO:
  """Attributes:
  beta: Strength of the implied KL penalty; larger stays
    closer to the reference.
  loss: Link function.
  """

  beta: float = 0.1
  loss: Literal["sigmoid", "ipo"] = "sigmoid"
  label_smoothing: float = 0.0

  def __post_init__(self):
    if self.beta <= 0:
      raise ValueError(f"beta must be positive, got {self.beta}; 0.1 is usual")


@dataclasses.dataclass(frozen=True)
class Config(Common):
  """The options.

  Attributes:
    shuffle (bool): Random order of batches.
    name: Name of the run.
  """

  shuffle: bool = True
  name: str = "run"
  max_length: int | None = None
  lr: float | None = 1e-3
  cache: bool | None = None
  layers: tuple[int, ...] = (2, 3)
  tags: tuple[str, ...] = ()
  level: Literal[1, 2] = 1
  dpo: DPO = DPO(beta=0.25)

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps must be at least 1, got {self.steps}")
    if self.name == "both":
      raise ValueError("dpo.loss ipo cannot go with name")
    if self.name == "odd":
      raise ValueError("this is odd")


@dataclasses.dataclass(frozen=True)
class PPO:
  """PPO.

  Attributes:
    kl_coef: Coefficient of the penalty.
  """

  kl_coef: float = 0.1

  def __post_init__(self):
    if self.kl_coef < 0:
      raise ValueError("kl_coef must not be negative")


@dataclasses.dataclass(frozen=True)
class PPORun(Common):
  """A run of PPO."""

  ppo: PPO = PPO()


@dataclasses.dataclass(frozen=True)
class Chain(Common):
  """Several runs."""

  ppo: PPORun = PPORun(steps=7)


def values(cls=Config, *args: str, **kwargs) -> Any:
  flag_values = absl_flags.FlagValues()
  build = flags.define(cls, flag_values=flag_values, **kwargs)
  flags.parse(["prog", *args], flag_values)
  return build()


def registry(cls=Config, **kwargs) -> absl_flags.FlagValues:
  flag_values = absl_flags.FlagValues()
  flags.define(cls, flag_values=flag_values, **kwargs)
  return flag_values


def test_defaults_are_those_of_the_dataclass():
  assert values() == Config()
  assert values(Config, defaults=Config(steps=3, dpo=DPO(beta=9.0))).dpo.beta == 9.0
  assert values(DPO, "--d.beta=2", prefix="d").beta == 2.0


def test_every_type_is_read():
  assert values(
    Config,
    "--steps=3",
    "--noshuffle",
    "--name=",
    "--max_length",
    "5",
    "--lr=none",
    "--cache=false",
    "--layers=4, 5",
    "--tags=a,b",
    "--level=2",
    "--dpo.beta=1e-2",
    "--dpo.loss=ipo",
  ) == Config(0, 3, False, "", 5, None, False, (4, 5), ("a", "b"), 2, DPO(0.01, "ipo"))
  assert values(Config, "--layers=").layers == ()
  assert type(values(DPO, "--beta=1").beta) is float


def test_repeated_name_is_written_once():
  chain = values(Chain, "--ppo.kl_coef=0.5", "--steps=1")
  assert (chain.steps, chain.ppo.steps, chain.ppo.ppo.kl_coef) == (1, 7, 0.5)
  with pytest.raises(flags.UsageError, match=r"^--ppo.kl_coef must not be negative"):
    values(Chain, "--ppo.kl_coef=-1")

  @dataclasses.dataclass(frozen=True)
  class Clash(Chain):
    ppo: Any = None

  Clash.__annotations__["ppo"] = dataclasses.make_dataclass(
    "Inner", [("kl_coef", float, 0.0), ("ppo", PPO, PPO())], frozen=True
  )
  with pytest.raises(
    ValueError, match=r"ppo.kl_coef and ppo.ppo.kl_coef would both be --ppo.kl_coef"
  ):
    registry(Clash, defaults=Clash(ppo=Clash.__annotations__["ppo"]()))


def test_help_comes_from_the_docstrings():
  found = registry()
  assert {name: found[name].help for name in ("seed", "steps", "shuffle", "dpo.beta")} == {
    "seed": "Random seed.",
    "steps": "Number of updates, of which every one counts: warm-up too.",
    "shuffle": "Random order of batches.",
    "dpo.beta": "Strength of the implied KL penalty; larger stays closer to the reference.",
  }


@pytest.mark.parametrize(
  "args, message",
  [
    ("--dpo.beta=-1", "--dpo.beta must be positive, got -1.0; 0.1 is usual"),
    ("--steps=0", "--steps must be at least 1, got 0"),
    ("--name=both", "--dpo.loss ipo cannot go with name"),
    ("--name=odd", "this is odd"),
    ("--dpo.beta=nan", "flag --dpo.beta=nan: must be a finite number"),
    ("--lr=-inf", "flag --lr=-inf: must be a finite number"),
    ("--lr=1e999", "flag --lr=1e999: must be a finite number"),
    ("--steps=1.5", "flag --steps=1.5: invalid literal for int()"),
    ("--steps=", "flag --steps=: invalid literal"),
    ("--steps", "Missing value for flag --steps"),
    ("--max_length=never", "flag --max_length=never: invalid literal"),
    ("--layers=1,x", "flag --layers=1,x: invalid literal"),
    ("--dpo.loss=hinge", "flag --dpo.loss=hinge: must be one of sigmoid, ipo"),
    ("--level=3", "flag --level=3: must be one of 1, 2"),
    ("--shuffle=maybe", "flag --shuffle=maybe: "),
    ("--name=a\x1b[0m", "flag --name=a\x1b[0m: must be printable"),
    ("--dpo.btea=1", "unknown flag --dpo.btea; did you mean --dpo.beta?"),
    ("--beta=1", "unknown flag --beta; did you mean --dpo.beta?"),
    ("--ppo.beta=1", "unknown flag --ppo.beta; did you mean --dpo.beta?"),
    ("--dpo.label-smoothing=1", "unknown flag --dpo.label-smoothing; did you mean --dpo.label_sm"),
    ("--max_steps=1", "unknown flag --max_steps; did you mean --steps?"),
    ("--stesp=1", "unknown flag --stesp; did you mean --steps?"),
    ("--xyzzy=1", "unknown flag --xyzzy; --help lists the flags"),
    ("--steps|=|5", "--steps = 5: write --steps=5, without spaces"),
    ("--steps|=5", "--steps = 5: write --steps=5, without spaces"),
    ("--steps=|5", "--steps = 5: write --steps=5, without spaces"),
    ("--shuffle|=|false", "--shuffle = false: write --shuffle=false, without spaces"),
    ("--flagfile=nowhere", "--flagfile=nowhere cannot be read: No such file"),
    ("--flagfile|/", "--flagfile=/ cannot be read: Is a directory"),
    ("--steps=1|--steps=1", "--steps is given 2 times; keep one"),
    ("--steps|1|-steps|2", "--steps is given 2 times"),
    ("--shuffle|--noshuffle", "--shuffle is given 2 times"),
    ("--shuffle|False", "stray word 'False': write --noshuffle or --shuffle=false"),
    ("--shuffle|true|--steps=5", "stray word 'true': write --shuffle"),
    ("lr=5", "stray word 'lr=5': write --lr=5"),
    ("steps|5", "stray word 'steps': write --steps=VALUE"),
    ("train|--steps=5", "stray word 'train': flags are written --name=value"),
    ("--name=a|b", "stray word 'b': flags are written --name=value (quote"),
    ("--|--steps=5", "stray word '--steps=5'"),
    ("-|x", "stray word '-'"),
  ],
)
def test_bad_command_lines_are_refused(args, message, record_property):
  record_property("bad inputs", 1)
  with pytest.raises((flags.UsageError, absl_flags.Error)) as e:
    values(Config, *args.split("|"))
  assert str(e.value).startswith(message)
  if isinstance(e.value, app.UsageError):
    assert e.value.exitcode == (1 if message.startswith("unknown flag") else 64)


def test_bad_definitions_are_refused():
  def field(kind, default):
    return dataclasses.make_dataclass("C", [("x", kind, default)], frozen=True)

  for cls, error, words in (
    (dataclasses.make_dataclass("C", [("x", int, 1)]), TypeError, "C must be a frozen dataclass"),
    (field(dict, None), TypeError, "--x: a flag cannot hold <class 'dict'>"),
    (field(int | str, 1), TypeError, "--x: a flag cannot hold"),
    (field(tuple[int, int], (1, 2)), TypeError, "--x: a flag cannot hold"),
    (field(float, float("nan")), ValueError, "the default of flag --x=nan: must be a finite"),
    (field(tuple[str, ...], ("a,b",)), ValueError, "would be read back as"),
    (field(str, "a\n"), ValueError, "must be printable"),
    (field(str | None, "none"), ValueError, "would be read back as None"),
  ):
    with pytest.raises(error, match=words.replace("(", r"\(")):
      registry(cls)


def test_field_without_default_is_required():
  cls = dataclasses.make_dataclass("C", [("workdir", str), ("dpo", DPO)], frozen=True)
  with pytest.raises(flags.UsageError, match=r"^--workdir=\.\.\. is needed"):
    values(cls)
  both = dataclasses.make_dataclass("C", [("workdir", str), ("policy", str)], frozen=True)
  with pytest.raises(flags.UsageError, match=r"^--workdir=\.\.\. and --policy=\.\.\. are needed"):
    values(both)
  assert values(cls, "--workdir=w").workdir == "w"


def test_flagfile_replays_the_run_and_can_be_overridden(tmp_path):
  args = ["--steps=3", "--lr=none", "--noshuffle", "--name=a b", "--dpo.beta=0.1", "--tags=x,y"]
  flag_values = absl_flags.FlagValues()
  build = flags.define(Config, flag_values=flag_values)
  flags.parse(["prog", *args], flag_values)
  path = tmp_path / "run" / "flags"
  flags.save_flags(path, flag_values)
  assert [p.name for p in path.parent.iterdir()] == ["flags"]
  assert "--max_length=none\n" in path.read_text()
  assert values(Config, f"--flagfile={path}") == build()
  # A later change of a default changes nothing.
  assert values(Config, "--flagfile", str(path), defaults=Config(seed=5)) == build()
  assert values(Config, f"--flagfile={path}", "--steps=4").steps == 4


def test_a_flag_file_replaces_no_flag_before_it(tmp_path):
  names = ("one", "other", "twice", "nested", "binary")
  one, other, twice, nested, binary = (str(tmp_path / name) for name in names)
  texts = {one: "--steps=3\n", other: "--steps=4\n", twice: "--seed=1\n--seed=2\n"}
  for path, text in (texts | {nested: f"--flagfile={one}\n"}).items():
    pathlib.Path(path).write_text(text)
  pathlib.Path(binary).write_bytes(b"\xff\xfe--steps=3")
  for words, message in (
    (["--steps=4", f"--flagfile={one}"], "--steps is given, and --flagfile="),
    (["--steps", "4", "--flagfile", one], "--steps is given, and --flagfile="),
    (["--steps=4", f"--flagfile={nested}"], "--steps is given, and --flagfile="),
    ([f"--flagfile={one}", f"--flagfile={other}"], "both have --steps"),
    ([f"--flagfile={twice}"], "has --seed 2 times; keep one"),
    ([f"--flagfile={binary}"], "is not a text file"),
  ):
    with pytest.raises(flags.UsageError, match=message):
      values(Config, *words)
  assert values(Config, f"--flagfile={one}", "--steps=4").steps == 4
  assert values(Config, "--seed=4", f"--flagfile={nested}").steps == 3


def test_changed_flags_and_their_lines_give_the_config_back(tmp_path):
  assert flags.changed(Config()) == {}
  for args in (("--steps=7", "--dpo.beta=0.5"), ("--layers=", "--dpo.loss=ipo")):
    config = values(Config, *args)
    changed = flags.changed(config)
    assert changed.keys() == {arg.partition("=")[0].removeprefix("--") for arg in args}
    lines = [flags.as_line(name, value) for name, value in changed.items()]
    assert lines == list(args)
  # Those of a default that differs from that of its own class do not count.
  assert flags.changed(Chain()) == {}
  assert flags.changed(values(Chain, "--ppo.kl_coef=2", "--ppo.steps=9")).keys() == {
    "ppo.kl_coef",
    "ppo.steps",
  }
  path = tmp_path / "flags"
  flags.save_configs(path, config)
  assert values(Config, f"--flagfile={path}") == config
  by_registry = registry()
  flags.parse(["prog", *args], by_registry)
  flags.save_flags(tmp_path / "same", by_registry)
  assert path.read_text() == (tmp_path / "same").read_text()


def test_to_dict_is_plain_json():
  config = Config(tags=("a",))
  assert json.loads(json.dumps(flags.to_dict(config))) == flags.to_dict(config)
  assert flags.to_dict(config)["dpo"] == {"beta": 0.25, "loss": "sigmoid", "label_smoothing": 0.0}
  assert flags.to_dict(config)["layers"] == [2, 3]


def test_flagsaver_overrides_values():
  flag_values = absl_flags.FLAGS
  build = flags.define(Config, prefix="flags_test")
  try:
    if not flag_values.is_parsed():
      flag_values.mark_as_parsed()
    with flagsaver.flagsaver(**{"flags_test.dpo.beta": 0.5}):
      assert build().dpo.beta == 0.5
    with flagsaver.as_parsed(**{"flags_test.tags": "a,b"}):
      assert build().tags == ("a", "b")
    assert build() == Config()
  finally:
    for name in [name for name in flag_values if name.startswith("flags_test.")]:
      delattr(flag_values, name)


@dataclasses.dataclass(frozen=True)
class _Inner:
  """Inner settings. More of them.

  Attributes:
    usual: A setting that many change.
    seldom: One that few change.
  """

  usual: float = 1.0
  seldom: int = ranges.rare(2)


@dataclasses.dataclass(frozen=True)
class _Outer:
  """Outer settings.

  Attributes:
    kind: Choice.
  """

  kind: Literal["a", "b"] = "a"
  inner: _Inner = _Inner()
  few: _Inner = dataclasses.field(default=_Inner(), metadata={"listed": ("seldom",)})


def test_help_has_titled_groups_in_order_without_rare_flags():
  values = absl_flags.FlagValues()
  flags.define(_Outer, flag_values=values)
  text = flags.help_text("Does it.\n\n  python -m it\n", values)
  assert text == (
    "Does it.\n\n  python -m it\n\n"
    "Outer settings\n  --kind=a\n      Choice. <a|b>\n\n"
    "Inner settings (--inner.*)\n  --inner.usual=1.0\n      A setting that many change.\n\n"
    "Inner settings (--few.*)\n  --few.seldom=2\n      One that few change.\n\n"
    "2 more flags are rarely set; --helpfull lists them.\n"
  )


def test_help_breaks_only_commands_that_are_too_wide():
  fits = '  python -m it \\\n    --runs="a b=c"\n'
  first, second = f"--first={'x' * 30}", f"--second={'y' * 30}"
  wide = f"  python -m it {first} {second} \\\n    --third=1\n"
  text = flags.help_text(f"Does it.\n\n{fits}\n{wide}", absl_flags.FlagValues())
  wrapped = f"  python -m it {first} \\\n    {second} --third=1\n"
  assert text == f"Does it.\n\n{fits}\n{wrapped}"


@pytest.mark.parametrize("script, most", [("ppo", 70), ("rlhf", 40), ("overoptimization", 140)])
def test_help_of_a_script_is_short(script, most):
  values = absl_flags.FlagValues()
  flags.define(loop.Session, flag_values=values)
  module = importlib.import_module(f"experiments.{script}")
  flags.define(module.Config, flag_values=values)
  text = flags.help_text(module.__doc__, values)
  assert text.count("\n  --") - module.__doc__.count("\n  --") <= most
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
  ("words", "refused"),
  [
    (("--epochs=2",), ""),
    (("--steps=10",), ""),
    (("--epochs=2", "--steps=10"), "--epochs is another way to say --steps; give one"),
    (("--epochs=0", "--steps=10"), ""),
    (("--sft.epochs=2", "--steps=10"), ""),
  ],
)
def test_two_ways_to_say_the_same_are_not_both_given(words, refused):
  registry = absl_flags.FlagValues()
  for prefix in ("", "sft."):
    absl_flags.DEFINE_integer(f"{prefix}steps", 100, "", flag_values=registry)
  for prefix in ("", "sft."):
    absl_flags.DEFINE_float(f"{prefix}epochs", 0.0, "", flag_values=registry)
  flags.parse(["script", *words], registry)
  if not refused:
    flags.refuse_both("epochs", "steps", registry)
    return
  with pytest.raises(flags.UsageError, match=refused):
    flags.refuse_both("epochs", "steps", registry)
