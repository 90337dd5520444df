"""The package as pip installs it, in a project with an `experiments` and a launch.py of its own.

The repository is not on the path: the package is the wheel that is made of the source distribution.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import filelock
import pytest

from tests.testing import full

PACKAGES = ("rlhf_jax", "experiments", "launch")
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, f'build_{sys.argv[1]}')('dist'))"
SMALL = ("--data.rows=64", "--data.eval_rows=8", "--batch_size=8", "--steps=2")
MODEL = ("--model.layers=1", "--model.width=32", "--model.heads=2", "--model.mlp_width=32")


def build(folder: pathlib.Path, kind: str) -> pathlib.Path:
  """Builds the `sdist` or `wheel` of a folder, without network."""
  command = [sys.executable, "-c", BUILD, kind]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(repository, tmp_path_factory) -> pathlib.Path:
  """An environment with the package, which all workers share; the wheel is in its folder `dist`."""
  versions = dict.fromkeys(("pip", "setuptools"), 0)
  for name in versions:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = int(importlib.metadata.version(name).partition(".")[0])
  if versions["pip"] < 23 or versions["setuptools"] < 77:
    pytest.skip(f"{versions} cannot build and install it")
  root = tmp_path_factory.getbasetemp()
  root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
  folder = root / "installed"
  with filelock.FileLock(root / "installed.lock"):
    if not (folder / "dist").exists():
      install(build_wheel(repository, root / "source"), folder)
  return folder


def build_wheel(repository: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Builds the wheel of the source distribution."""
  folder.mkdir()
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(repository / name, folder)
  for name in PACKAGES:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / name, folder / name, ignore=ignore)
  with tarfile.open(build(folder, "sdist")) as archive:
    # Python 3.11 has filters since 3.11.4.
    archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
    archive.extractall(folder / "unpacked")
  (unpacked,) = (folder / "unpacked").iterdir()
  return build(unpacked, "wheel")


def install(wheel: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes an environment with a wheel, and with what the present one has beside it."""
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
  (site,) = folder.glob("lib/python*/site-packages")
  # A path in a .pth file: the .pth files of that folder, such as the one of `pip install -e`, are
  # not read.
  paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
  paths |= {path for path in sys.path if path.endswith("site-packages")}
  (site / "others.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
  pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
  offline = ["--no-index", "--no-deps", "--no-compile", "--ignore-installed"]
  subprocess.run([*pip, *offline, wheel], check=True)
  (folder / "dist").mkdir()
  shutil.copy(wheel, folder / "dist")


@pytest.fixture
def project(tmp_path) -> pathlib.Path:
  """A folder with names that are also those of folders of the repository."""
  (tmp_path / "experiments").mkdir()
  (tmp_path / "experiments" / "__init__.py").write_text("")
  (tmp_path / "experiments" / "words.py").write_text("WANTED = 20\n")
  (tmp_path / "experiments" / "rewards.py").write_text(
    "from experiments.words import WANTED\n\n\n"
    "def brevity(prompts, responses, rows):\n"
    "  return [-abs(len(text.split()) - WANTED) for text in responses]\n"
  )
  (tmp_path / "launch.py").write_text("raise SystemExit('this is not the launcher')\n")
  return tmp_path


@pytest.fixture
def run(installed, project):
  """`run(*words, code=0) -> output` of `rlhf-jax words` in the project."""

  def run(*words: str, code: int = 0) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = f"{installed / 'bin'}{os.pathsep}{env['PATH']}"
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    done = subprocess.run(
      ["rlhf-jax", *words],
      cwd=project,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert done.returncode == code, done.stdout
    return done.stdout

  return run


def test_the_wheel_has_one_name_and_every_file(installed, repository):
  (wheel,) = (installed / "dist").iterdir()
  with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if ".dist-info/" not in name]
    metadata = next(name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    entry_points = archive.read(metadata).decode()
  assert {name.partition("/")[0] for name in names} == {"rlhf_jax"}
  wanted = set()
  for package in PACKAGES:
    outer = "" if package == "rlhf_jax" else "rlhf_jax/"
    files = [path for path in (repository / package).rglob("*") if path.is_file()]
    wanted |= {f"{outer}{path.relative_to(repository).as_posix()}" for path in files}
  wanted = {name for name in wanted if not name.endswith((".md", ".ipynb", ".png", ".pyc"))}
  assert set(names) == wanted
  assert entry_points == "[console_scripts]\nrlhf-jax = rlhf_jax.__main__:main\n"


def test_a_script_explains_itself(run):
  output = run("sft", "--help")
  assert output.startswith("Fine-tunes a language model on demonstrations.")
  assert "  rlhf-jax sft --workdir=runs/sft" in output and "python -m experiments" not in output


def test_a_job_of_a_project_with_these_names(run):
  """The launcher starts the script, which imports the reward of the project's `experiments`."""
  reward = "--reward.name=experiments.rewards:brevity"
  job = ("launch", "--to=local", "--dry_run", "--")
  shown = run(*job, "ppo", "--workdir=runs/ppo", "--init_from=.", reward)
  assert shown.startswith("# ppo: rlhf_jax.experiments.ppo on CPU\n")
  assert " -m rlhf_jax.experiments.ppo --workdir=runs/ppo " in shown
  refused = run(*job, "experiments.pppo", "--workdir=runs/ppo", code=64)
  assert refused == "there is no module experiments.pppo; there are rewards, words\n"


@full
@pytest.mark.slow
def test_the_chain_runs(run, project):
  run("sft", "--workdir=runs/sft", *SMALL, *MODEL)
  shown = run("reward_model", "--workdir=runs/rm", "--init_from=runs/sft", *SMALL)
  assert "next: rlhf-jax ppo " in shown
  start = ("--init_from=runs/sft", *SMALL, "--sampling.max_new_tokens=4")
  run("ppo", "--workdir=runs/ppo", "--reward.path=runs/rm", *start)
  card = (project / "runs/ppo/export/README.md").read_text()
  assert "python -m rlhf_jax.experiments.ppo --flagfile=RUN/flags --workdir=NEW" in card

  # A reward of the project, and what it imports: an edit makes it another run.
  own = ("--reward.name=experiments.rewards:brevity", *start)
  run("launch", "--to=local", "--processes=2", "--", "ppo", "--workdir=runs/own", *own)
  run("ppo", "--workdir=runs/own", *own)
  (project / "experiments" / "words.py").write_text("WANTED = 5\n")
  assert "file of --reward.name was" in run("ppo", "--workdir=runs/own", *own, code=78)

  run("plot", "--workdir=runs/report", "--runs=runs/ppo,runs/own")
  assert (project / "runs/report/report.html").exists()
  pytest.importorskip("optuna")
  sweep = ("--study=runs/sweep", "--space=dpo", "--trials=1")
  run("sweep", *sweep, "--", "dpo", *start)
  summary = json.loads((project / "runs/sweep/trials/0000/summary.json").read_text())
  assert "gold/win_rate" in summary
