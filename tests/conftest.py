"""Settings and fixtures of every test: 8 virtual CPU devices, no network, no display."""

import os
import pathlib

# Read when jax and the Hugging Face libraries are first imported, so set before that happens.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Would make rich and others treat a captured stream as a terminal.
for _name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
  os.environ.pop(_name, None)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


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
