"""Functions that settings name as `module:function`: found, refused, fingerprinted."""

import hashlib
import importlib
import math
import os
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import rewards, user
from rlhf_jax.algorithms.dpo import DPOConfig

ARGUMENTS = ("prompts", "responses", "rows")
GOOD = """
import statistics

class Scorer:
  pass

class Length:
  def __call__(self, prompts, responses, rows):
    return [len(r) for r in responses]

def score(prompts, responses, rows):
  return [float(len(r)) for r in responses]

def with_option(prompts, responses, rows, scale=1.0):
  return [scale] * len(responses)

def of_anything(*args, **kwargs):
  return [0.0]

def of_two(prompts, responses):
  return [0.0]

def needs_more(prompts, responses, rows, tokenizer):
  return [0.0]

def loss(pw, pl, rw, rl, *, beta):
  return -beta * ((pw - rw) - (pl - rl))

by_length = Length()
constant = 3
in_c = print
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The working directory, whose modules are forgotten afterwards."""
  known = set(sys.modules)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
  monkeypatch.setattr(user, "_resolved", {})
  monkeypatch.delenv("PYTHONPATH", raising=False)
  (tmp_path / "my_parts.py").write_text(GOOD)
  yield tmp_path
  for name in set(sys.modules) - known:
    if name.startswith("my_"):
      del sys.modules[name]


def resolve(name, arguments=ARGUMENTS, keywords=()):
  return user.resolve("name", name, {"gold": max}, arguments, keywords)


@pytest.mark.parametrize("function", ["score", "with_option", "of_anything", "by_length", "in_c"])
def test_a_function_of_the_working_directory(folder, function):
  path = list(sys.path)
  assert resolve(f"my_parts:{function}") is getattr(sys.modules["my_parts"], function)
  # Behind everything else: a file of the folder never stands in for an installed module.
  assert sys.path == [*path, str(folder)]
  resolve(f"my_parts:{function}")
  assert sys.path == [*path, str(folder)]


def test_a_function_of_a_package_and_of_the_running_script(folder, monkeypatch):
  (folder / "my_package").mkdir()
  (folder / "my_package" / "rewards.py").write_text(GOOD)
  assert resolve("my_package.rewards:score")([], ["ab"], []) == [2.0]
  main = types.ModuleType("__main__")
  main.score = lambda prompts, responses, rows: [1.0]
  monkeypatch.setitem(sys.modules, "__main__", main)
  assert resolve("__main__:score") is main.score


@pytest.mark.parametrize(
  "name, message",
  [
    ("silver", "name must be one of gold, or module:function of your own; got 'silver'"),
    ("my_parts.py:score", "module of FOLDER/my_file.py is my_file, with FOLDER as the working"),
    ("./my_parts:score", "name must be a key or module:function"),
    ("my_parts:", "name must be a key or module:function"),
    ("my_parts:score()", "name must be a key or module:function"),
    ("my_parts:a.b", "name must be a key or module:function"),
    ("my_parts:scroe", "my_parts.py has no function scroe; did you mean score?"),
    ("my_parts:nothing_like_it", "my_parts.py has no function nothing_like_it$"),
    ("my_parts:constant", "my_parts.py has no function constant"),
    ("my_parts:Scorer", "Scorer is a class: name a function, or an object that can be called"),
    ("my_parts:of_two", r"must take \(prompts, responses, rows\), .*too many positional"),
    ("my_parts:needs_more", r"must take \(prompts, .*missing a required argument: 'tokenizer'"),
    ("my_absent:score", r"no module my_absent in \S*0, on PYTHONPATH \(empty\) or among the inst"),
    ("my_parts.deep:score", "there is no module my_parts.deep in"),
  ],
)
def test_a_name_that_is_refused(folder, name, message):
  with pytest.raises(ValueError, match=message) as refusal:
    resolve(name)
  assert str(refusal.value).startswith("name")
  assert "\n" not in str(refusal.value)


def test_keywords_are_a_part_of_what_it_must_take(folder):
  four = ("a", "b", "c", "d")
  assert resolve("my_parts:loss", four, ["beta"])
  with pytest.raises(ValueError, match=r"must take \(a, b, c, d, gamma=\)"):
    resolve("my_parts:loss", four, ["gamma"])


@pytest.mark.parametrize(
  "source, message",
  [
    ("import torch_of_another_kind", r"my_bad.py:1: ModuleNotFoundError: No module named 'torch_o"),
    ("\n\nx = 1 / 0", "my_bad.py:3: ZeroDivisionError: division by zero"),
    ("import json\njson.loads('{')", "my_bad.py:2: JSONDecodeError: "),
    ("def f(:", r"SyntaxError: .*\(my_bad.py, line 1\)"),
    ("import sys\nsys.exit(2)", "ends the process; put what it runs under if __name__"),
  ],
)
def test_a_module_that_fails_names_its_line(folder, source, message):
  (folder / "my_bad.py").write_text(source)
  with pytest.raises(ValueError, match=f"name=my_bad:f cannot be imported: .*{message}"):
    resolve("my_bad:f")


def test_pythonpath_is_named_where_it_was_searched(folder, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
  with pytest.raises(ValueError, match=r"PYTHONPATH \(/somewhere/else\)"):
    resolve("my_absent:score")


def test_the_digest_is_that_of_the_file_as_it_was_imported(folder):
  settings = {"reward.name": "my_parts:score", "data.tfds": "my_other:train", "steps": 3}
  assert user.digests(settings) == {}  # Only what a setting has resolved is looked at.
  resolve("my_parts:score")
  first = hashlib.sha256(GOOD.encode()).hexdigest()
  assert user.digests(settings) == {"file of --reward.name": first}
  assert "my_other" not in sys.modules
  both = {"reward.name": "my_parts:score,gold"}  # One of several functions of the user.
  assert user.digests(both) == {"file of --reward.name": first}
  twice = hashlib.sha256((first * 2).encode()).hexdigest()
  both["reward.name"] = "my_parts:score,my_parts:score"
  assert user.digests(both) == {"file of --reward.name": twice}
  # An edit while the process runs does not change what it runs; a reload does.
  (folder / "my_parts.py").write_text(GOOD + "# Edited, and longer.\n")
  resolve("my_parts:score")
  assert user.digests(settings) == {"file of --reward.name": first}
  importlib.reload(sys.modules["my_parts"])
  resolve("my_parts:score")
  assert user.digests(settings) not in ({}, {"file of --reward.name": first})


@pytest.mark.parametrize(
  "line",
  [
    "import my_words",
    "from my_words import WORDS",
    "import statistics, my_words as words",
    "import my_middle",
    "def later():\n  import my_words",
    "import my_package.inner",
    "from my_package import inner",
  ],
)
def test_the_modules_of_the_user_that_the_file_imports_are_covered(folder, line):
  (folder / "my_words.py").write_text("WORDS = 1\n")
  (folder / "my_middle.py").write_text("import my_words, my_sum\n")
  (folder / "my_package").mkdir()
  (folder / "my_package" / "__init__.py").write_text("")
  (folder / "my_package" / "inner.py").write_text("A = 1\n")
  (folder / "my_package" / "other.py").write_text("A = 1\n")
  (folder / "my_sum.py").write_text(f"{line}\ndef score(prompts, responses, rows): ...\n")

  def digest():
    for name in [name for name in sys.modules if name.startswith("my_")]:
      del sys.modules[name]
    importlib.invalidate_caches()
    resolve("my_sum:score")
    return user.digests({"reward.name": "my_sum:score"})

  before = digest()
  assert digest() == before != {}
  (folder / "my_package" / "other.py").write_text("A = 2 + 2\n")  # Nobody imports it.
  assert digest() == before
  changed = "my_package/inner.py" if "package" in line else "my_words.py"
  (folder / changed).write_text("WORDS = A = 20 + 2\n")
  assert digest() != before


@pytest.mark.parametrize("package", ["experiments", "launch"])
def test_a_package_of_the_user_may_have_the_name_of_a_folder_of_a_clone(
  folder, monkeypatch, package
):
  of_clone = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_in(name, package)}
  monkeypatch.syspath_prepend(folder)  # Before the clone.
  (folder / package).mkdir()
  (folder / package / "__init__.py").write_text("")
  digests = []
  try:
    for words in ("WORDS = 1\n", "WORDS = 20 + 2\n"):
      (folder / package / "words.py").write_text(words)
      (folder / package / "score.py").write_text(
        f"from {package}.words import WORDS\ndef score(prompts, responses, rows): ...\n"
      )
      importlib.invalidate_caches()
      resolve(f"{package}.score:score")
      digests.append(user.digests({"reward.name": f"{package}.score:score"}))
      for name in [name for name in sys.modules if _is_in(name, package)]:
        del sys.modules[name]
  finally:
    sys.modules.update(of_clone)
  assert digests[0] != digests[1]


def _is_in(name: str, package: str) -> bool:
  return name == package or name.startswith(f"{package}.")


def test_functions_without_a_source_have_no_digest(folder):
  user.resolve("name", "builtins:print", {}, ("values",))
  assert user.digests({"reward.name": "builtins:print"}) == {}


def results():
  return [
    ([1, 2, 3], None),
    (np.arange(3), None),
    (jnp.ones(3, jnp.bfloat16), None),
    ([True, False, True], None),
    (2.0, r"gave shape \(\) for 3 responses; it must return one number per response"),
    ([1.0, 2.0], r"gave shape \(2,\) for 3 responses"),
    ([[1.0]] * 3, r"gave shape \(3, 1\) for 3 responses"),
    ([1.0, float("nan"), 2.0], 1),
    ([1.0, None, 2.0], 1),
    ([1.0, 2.0, -np.inf], 2),
    ([np.inf, 2.0, 1.0], 0),
    ([1.0, 2.0, 1e39], 2),
    ([1.0, -1e30, 2.0], 1),
    (np.array([1.0, 2.0, 1e9]), 2),
    ([1.0, 2.0, -(10**400)], "gave a list without numbers"),
    (np.array(["2020", "2021", "2022"], "M8[Y]"), "gave a ndarray without numbers"),
    ("abc", "gave a str without numbers"),
    (["1", "2", "3"], "gave a list without numbers; it must return one number"),
    ({"a": 1}, "gave a dict without numbers"),
    (None, "gave None for 3 responses; it must return one number per response"),
    ((x for x in "abc"), "gave a generator without numbers"),
    ([[1.0], [1.0, 2.0], []], "gave a list without numbers"),
    (OfAnotherLibrary(), "gave a OfAnotherLibrary without numbers"),
  ]


class OfAnotherLibrary:
  """Tensor that needs a gradient, as a reward model of PyTorch returns it."""

  def __array__(self, dtype=None, copy=None):
    raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize("values, expected", results())
def test_results_of_a_reward(values, expected):
  """`expected` is the place of the number that cannot be used, or the message."""

  def of_mine(prompts, responses, rows):
    return values

  texts = ["a", "bbb", "c"]
  if isinstance(expected, str):
    name = r"tests\.user_test:test_results_of_a_reward\.<locals>\.of_mine"
    with pytest.raises(user.ResultError, match=f"reward function {name} {expected}"):
      rewards.ask(of_mine, texts, texts, rows=[{}] * 3)
    return
  numbers = rewards.ask(of_mine, texts, texts, rows=[{}] * 3)
  assert numbers.shape == (3,) and numbers.dtype == np.float32
  unusable = [] if expected is None else [expected]
  assert np.flatnonzero(np.isnan(numbers)).tolist() == unusable


@pytest.mark.parametrize("value", [1.5, -0.1, 7.0])
def test_results_of_a_preference(value):
  def judge(prompts, a, b, rows):
    return [0.5, value]

  with pytest.raises(user.ResultError, match=rf"outside \[0, 1\]: {value:g} for pair 1, 'b'"):
    rewards.ask(judge, ["p"] * 2, ["a", "b"], ["c", "d"], rows=[{}] * 2)


@pytest.mark.parametrize("value", [float("nan"), None, np.inf, -np.inf])
def test_a_preference_that_is_no_number_is_left_out(value):
  judge = lambda prompts, a, b, rows: [0.5, value]  # noqa: E731
  numbers = rewards.ask(judge, ["p"] * 2, ["a", "b"], ["c", "d"], rows=[{}] * 2)
  np.testing.assert_array_equal(numbers, [0.5, np.nan])


class Careless:
  def __call__(self, prompts, responses, rows):
    raise KeyError("label")


class Refusal(Exception):
  exit_code = 65


def refuse(prompts, responses, rows):
  raise Refusal("row 3: no answer")


@pytest.mark.parametrize(
  "function, error, message",
  [
    (
      Careless(),
      user.RaisedError,
      r"^reward function tests\.user_test:Careless raised .*user_test",
    ),
    (lambda p, r, rows: 1 / 0, user.RaisedError, r"<lambda> raised .*division by zero"),
    (math.fsum, user.RaisedError, r"^reward function math:fsum raised TypeError"),
    (refuse, Refusal, "row 3: no answer"),  # Its message says what is wrong with the data.
  ],
)
def test_a_function_that_raises_is_named(function, error, message):
  with pytest.raises(error, match=message):
    rewards.ask(function, ["a"], ["b"], rows=[{}])


def sleep(*args):
  time.sleep(30)


def spin(*args):
  end = time.monotonic() + 30
  while time.monotonic() < end:
    pass


def sort(*args):
  sorted(range(30), key=lambda _: time.sleep(1))


HANGS = [(sleep, "reward"), (spin, "constraint"), (sort, "preference")]


@pytest.mark.parametrize(("function", "kind"), HANGS)
def test_a_function_that_hangs_is_named_with_its_line(function, kind):
  responses = [["b"]] * (2 if kind == "preference" else 1)
  limited = user.limited(function, 0.5)
  message = (
    rf"^{kind} function tests\.user_test:{function.__name__} raised TimeoutError: it took more"
    r" than 0\.5 seconds, at .*user_test\.py:\d+$"
  )
  begin = time.monotonic()
  with pytest.raises(user.RaisedError, match=message) as e:
    rewards.ask(limited, ["a"], *responses, rows=[{}], kind=kind)
  assert e.value.exit_code == 70 and time.monotonic() - begin < 25


def test_a_limit_changes_nothing_for_a_function_that_ends():
  double = lambda prompts, responses, rows: [2.0 * len(text) for text in responses]  # noqa: E731
  assert user.limited(double, 0.0) is double
  limited = user.limited(double, 60.0)
  given = [rewards.ask(f, ["a"] * 2, ["b", "cc"], rows=[{}] * 2) for f in (double, limited)]
  np.testing.assert_array_equal(*given)
  for function, error in ((Careless(), user.RaisedError), (refuse, Refusal)):
    messages = []
    for tried in (function, user.limited(function, 60.0)):
      with pytest.raises(error) as e:
        rewards.ask(tried, ["a"], ["b"], rows=[{}])
      messages.append(str(e.value))
    assert messages[0] == messages[1]


def test_a_function_has_the_name_by_which_it_was_resolved(folder, monkeypatch):
  monkeypatch.setattr(sys, "path", list(sys.path))
  (folder / "my_named.py").write_text("score = lambda prompts, responses, rows: None\n")
  function = user.resolve("name", "my_named:score", {}, ("prompts", "responses", "rows"))
  for limited in (function, user.limited(function, 60.0)):
    with pytest.raises(user.ResultError, match="reward function my_named:score gave None for 1"):
      rewards.ask(limited, ["a"], ["b"], rows=[{}])


LOSSES = """
import jax
import jax.numpy as jnp

def squared(pw, pl, rw, rl, *, beta):
  return (beta * ((pw - rw) - (pl - rl)) - 1) ** 2

def mean(pw, pl, rw, rl, *, beta):
  return jnp.mean(pw - pl)

def column(pw, pl, rw, rl, *, beta):
  return (pw - pl)[:, None]

def whole(pw, pl, rw, rl, *, beta):
  return (pw > pl).astype(int)

def pair(pw, pl, rw, rl, *, beta):
  return pw - pl, {}

def nothing(pw, pl, rw, rl, *, beta):
  pw - pl

def branches(pw, pl, rw, rl, *, beta):
  if pw[0] > pl[0]:
    return pw
  return pl

def without_beta(pw, pl, rw, rl):
  return pw
"""


def test_a_loss_is_used_as_it_is(folder):
  (folder / "my_losses.py").write_text(LOSSES)
  config = DPOConfig(loss="my_losses:squared", beta=0.5)
  assert config.loss == "my_losses:squared"
  with pytest.raises(ValueError, match="label_smoothing is not defined for loss=my_losses:squared"):
    DPOConfig(loss="my_losses:squared", label_smoothing=0.1)


@pytest.mark.parametrize(
  "function, message",
  [
    ("mean", r"gave float32\[\] for 3 pairs; it must return float\[3\], one loss per pair"),
    ("column", r"gave float32\[3, 1\] for 3 pairs"),
    ("whole", r"gave int32\[3\] for 3 pairs"),
    ("pair", "gave tuple for 3 pairs"),
    ("nothing", "gave NoneType for 3 pairs"),
    ("branches", r"cannot be traced: \S*my_losses.py:24: TracerBoolConversionError"),
    ("without_beta", r"must take \(policy_chosen, policy_rejected, .*, beta=\)"),
  ],
)
def test_a_loss_that_is_refused_before_anything_is_compiled(folder, function, message):
  (folder / "my_losses.py").write_text(LOSSES)
  with pytest.raises(ValueError, match=f"loss=my_losses:{function} {message}"):
    DPOConfig(loss=f"my_losses:{function}")


def test_the_check_of_a_loss_touches_no_device(folder, repository):
  """Several processes have not met when settings are read, and no device may be used before."""
  (folder / "my_losses.py").write_text(LOSSES)
  code = "from rlhf_jax.algorithms.dpo import DPOConfig; DPOConfig(loss='my_losses:squared')"
  env = os.environ | {"PYTHONPATH": str(repository), "JAX_PLATFORMS": "none_that_exists"}
  subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)
