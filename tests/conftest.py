"""Settings and fixtures of every test: 8 virtual CPU devices, no network, no display."""

import gc
import importlib.metadata
import os
import pathlib
import shutil

# Read when jax and the Hugging Face libraries are first imported, so set before that happens.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# Most of the time of small programs is that of compiling them, half of it LLVM's optimisation. The
# last of two equal flags wins: the ones that were given, except for the devices. What compiles
# fusions by default takes twice as long as what it replaced, which newer versions no longer have.
_OLD_FUSIONS = importlib.metadata.version("jaxlib").startswith("0.10.")
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # The other core has a worker of its own.
    "--xla_cpu_use_fusion_emitters=false" if _OLD_FUSIONS else "",
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
  )
)
# What takes time to compile is kept for the other workers, for scripts that are started several
# times, and for the next run. JAX's own limit would read the whole folder for each new program.
_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
_CACHE = _REPOSITORY / ".pytest_cache" / "jax"
if (
  "PYTEST_XDIST_WORKER" not in os.environ
  and sum(file.stat().st_size for file in _CACHE.glob("*")) > 2**30
):
  shutil.rmtree(_CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["MPLBACKEND"] = "Agg"
gc.set_threshold(100_000, 20, 20)  # Tracing makes many objects and hardly any garbage.
# Would make rich and others treat a captured stream as a terminal.
for _name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
  os.environ.pop(_name, None)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files with slow tests come first, so that no worker is left alone with one at the end."""
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
  """Imported modules and collected tests stay: the collector need not look at them again."""
  gc.freeze()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
  """The root of the source tree."""
  return _REPOSITORY


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of data and small models beside the repository."""
  folder = _REPOSITORY.parent / "shared"
  if not folder.is_dir():
    pytest.skip("there is no folder `shared` beside the repository")
  return folder


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
  """A Hugging Face folder of SmolLM2-135M-Instruct in float32."""
  folder = os.environ.get("SMOLLM2_PATH")
  if not folder:
    pytest.skip("SMOLLM2_PATH is not set")
  if not (pathlib.Path(folder) / "config.json").is_file():
    pytest.skip(f"SMOLLM2_PATH={folder} holds no config.json")
  return pathlib.Path(folder)


@pytest.fixture
def launch_here(monkeypatch, repository):
  """`python -m launch.run ARGUMENTS` in this process: `(exit code, message)`.

  Its script reads its flags here too, and files of hosts are not looked for.
  """
  from absl import flags as absl_flags
  from absl.testing import flagsaver

  from launch import run
  from launch.job import Job, JobError
  from rlhf_jax.flags import UsageError
  from tests.testing import read_configs

  def check(job: Job) -> None:
    configs = read_configs(job.module, job.flags)
    getattr(configs[-1], "require", lambda: None)()

  monkeypatch.setattr(run, "check_flags", check)
  monkeypatch.setattr(run, "check_paths", lambda job: None)
  monkeypatch.chdir(repository)

  def start(*arguments: str) -> tuple[int, str]:
    with flagsaver.flagsaver():
      try:
        return run.launch(run.parse(["launch.run", *arguments])[1:]), ""
      except (JobError, UsageError, absl_flags.Error) as error:
        return 64, str(error)

  return start
