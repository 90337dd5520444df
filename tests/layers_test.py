"""Imports between modules, and bans on unsafe uses of outside input."""

import ast
import pathlib
import shutil
import subprocess
import sys

import pytest

PACKAGES = ("rlhf_jax", "experiments", "launch")


def _check_contracts(folder: pathlib.Path) -> subprocess.CompletedProcess:
  # A process of its own: import-linter keeps global state, and must see this folder's packages.
  code = "import sys; from importlinter.cli import lint_imports as f; sys.exit(f(no_cache=True))"
  return subprocess.run(
    [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
  )


def test_import_contracts_hold(repository):
  result = _check_contracts(repository)
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def tree(repository, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tree")
  shutil.copy(repository / "pyproject.toml", folder)
  ignore = shutil.ignore_patterns("__pycache__")
  for package in PACKAGES:
    shutil.copytree(repository / package, folder / package, ignore=ignore)
  return folder


@pytest.mark.parametrize(
  "path, line, contract",
  [
    ("rlhf_jax/types.py", "import rlhf_jax.losses", "Layers"),
    ("rlhf_jax/ranges.py", "import rlhf_jax.losses", "Layers"),
    ("rlhf_jax/losses/masked.py", "import rlhf_jax.train_step", "Layers"),
    ("rlhf_jax/algorithms/dpo.py", "from rlhf_jax.models import build", "Layers"),
    ("rlhf_jax/unplaced.py", "", "Layers"),
    ("rlhf_jax/algorithms/kto.py", "import rlhf_jax.algorithms.dpo", "Methods"),
    ("rlhf_jax/algorithms/ppo.py", "import rlhf_jax.algorithms.ppo_max", "Methods"),
    ("rlhf_jax/algorithms/reading.py", "import rlhf_jax.algorithms.sft", "Methods"),
    ("experiments/dpo.py", "import experiments.sft", "Scripts"),
    ("experiments/lab/models.py", "import experiments.sft", "Scripts"),
    ("experiments/records/card.py", "import experiments.sft", "Scripts"),
    ("rlhf_jax/loop.py", "import experiments.sft", "scripts"),
    ("launch/planted.py", "import jax", "launch works"),
    ("launch/planted.py", "import rlhf_jax.types", "launch works"),
    ("rlhf_jax/losses/masked.py", "import numpy", "losses import"),
    ("rlhf_jax/algorithms/ppo.py", "from flax import nnx", "flax only"),
    ("experiments/sft.py", "import tensorflow_datasets", "tensorflow_datasets and grain"),
    ("rlhf_jax/loop.py", "import grain", "tensorflow_datasets and grain"),
    ("rlhf_jax/models/build.py", "import transformers", "transformers only"),
  ],
)
def test_import_contracts_catch(tree, path, line, contract):
  file = tree / path
  before = file.read_text() if file.exists() else None
  file.write_text((before or "") + f"\n{line}\n")
  try:
    result = _check_contracts(tree)
  finally:
    file.unlink() if before is None else file.write_text(before)
  output = " ".join(result.stdout.split())  # Wrapped to the width of a terminal.
  _, broken, details = output.partition("Broken contracts")
  assert result.returncode == 1 and broken, output
  assert contract in details, output


def _sources(folder: pathlib.Path, *packages: str) -> list[pathlib.Path]:
  return sorted(path for package in packages for path in (folder / package).rglob("*.py"))


def _imports(source: str) -> set[str]:
  """Dotted names that `source` imports; `from a import b` gives both `a` and `a.b`."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return names


@pytest.mark.parametrize("source", ["import absl.flags", "from absl import app, flags"])
def test_imports_of_source(source):
  assert "absl.flags" in _imports(source)


def test_absl_flags_only_in_flags_entry_and_experiments(repository):
  # Not a contract: import-linter does not look inside external packages, and absl.logging is
  # welcome everywhere.
  users = {
    path.relative_to(repository).as_posix()
    for path in _sources(repository, "rlhf_jax", "launch")
    if "absl.flags" in _imports(path.read_text())
  }
  # `launch` has scripts of its own and must not import `rlhf_jax`.
  assert users <= {"rlhf_jax/flags.py", "rlhf_jax/entry.py", "launch/run.py", "launch/pod.py"}


def test_losses_import_only_what_they_need(repository):
  allowed = {"jax", "chex", "optax", "rlhf_jax"} | sys.stdlib_module_names
  for path in _sources(repository, "rlhf_jax/losses"):
    roots = {name.split(".")[0] for name in _imports(path.read_text())}
    assert roots <= allowed, path


def test_importing_losses_is_light(repository):
  heavy = ("flax", "orbax", "transformers", "tensorflow_datasets", "grain", "matplotlib", "rich")
  code = f"import rlhf_jax.losses, sys; print(*[m for m in {heavy} if m in sys.modules])"
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
  )
  assert result.stdout.split() == []


_MODULES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch"}
_CALLS = {
  "eval",
  "exec",
  "os.popen",
  "os.system",
  "torch.load",
  "yaml.load",
  "yaml.unsafe_load",
  "yaml.full_load",
}
_METHODS = {"deserialize_and_load"}  # Of jax.experimental.serialize_executable: it unpickles.
_KEYWORDS = {"allow_pickle", "shell", "trust_remote_code"}


def _unsafe(source: str) -> list[str]:
  """Lists calls in `source` that can run code from data, or pass text to a shell."""
  imported = _imports(source)
  found = [name for name in imported if name.split(".")[0] in _MODULES or name in _CALLS]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Attribute) and (ast.unparse(node) in _CALLS or node.attr in _METHODS):
      found.append(ast.unparse(node))
    if isinstance(node, ast.Name) and node.id in ("eval", "exec"):
      found.append(node.id)
    if isinstance(node, ast.keyword) and node.arg in _KEYWORDS:
      is_off = isinstance(node.value, ast.Constant) and node.value.value is False
      if not is_off:
        found.append(f"{node.arg}={ast.unparse(node.value)}")
  return found


def test_no_code_comes_from_data(repository):
  paths = _sources(repository, *PACKAGES)
  assert paths
  found = {str(path.relative_to(repository)): _unsafe(path.read_text()) for path in paths}
  for path, what in found.items():
    if path.startswith("experiments/bench/peers/"):  # Programs that other Pythons run.
      what[:] = [name for name in what if name.split(".")[0] != "torch" or name in _CALLS]
  assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
  "source",
  [
    "import pickle",
    "import cloudpickle as c",
    "from dill import loads",
    "import joblib",
    "import shelve",
    "from marshal import loads",
    "def f():\n  import torch",
    "torch.load(path)",
    "np.load(path, allow_pickle=True)",
    "np.load(path, allow_pickle=flag)",
    "yaml.load(text)",
    "eval(text)",
    "run = exec",
    "os.system(command)",
    "from os import system",
    "subprocess.run(command, shell=True)",
    "from_pretrained(path, trust_remote_code=True)",
    "serialize_executable.deserialize_and_load(x, y, z)",
  ],
)
def test_the_lint_catches(source):
  assert _unsafe(source)


@pytest.mark.parametrize(
  "source",
  [
    "np.load(path, allow_pickle=False)",
    "yaml.safe_load(text)",
    "model.eval_shape(x)",
    "text = 'never unpickle, never eval(x)'",
    "jax.jit(f).lower(x).compile()",
    "subprocess.run(['ls'], check=True)",
  ],
)
def test_the_lint_lets_pass(source):
  assert not _unsafe(source)
