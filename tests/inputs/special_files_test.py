"""Pipes, devices, sockets and folders where a file is expected."""

import os
import pathlib
import shutil
import socket

import pytest

from experiments.annotation import judge, label_studio
from experiments.lab import models
from rlhf_jax import data, defaults, flags
from rlhf_jax.models import hf
from tests.inputs.refused import refusal
from tests.testing import define_flags


def _fifo(path: pathlib.Path) -> str:
  os.mkfifo(path)
  return "a FIFO"


def _device(path: pathlib.Path) -> str:
  path.symlink_to("/dev/zero")
  return "a device"


def _socket(path: pathlib.Path) -> str:
  with socket.socket(socket.AF_UNIX) as listener:
    here = os.getcwd()
    os.chdir(path.parent)  # The name of a socket has at most 108 bytes.
    try:
      listener.bind(path.name)
    finally:
      os.chdir(here)
  return "a socket"


def _folder(path: pathlib.Path) -> str:
  path.mkdir()
  return "a folder"


MAKERS = (_fifo, _device, _socket, _folder)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
  "name",
  [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "model.safetensors", "model.safetensors.index.json"),
  ],
)
def test_a_model_folder_has_files(model_folder, tmp_path, name, make):
  folder = tmp_path / "model"
  shutil.copytree(model_folder, folder)
  (folder / name).unlink(missing_ok=True)
  kind = make(folder / name)
  defaults.is_builtin(folder)
  for read, code in (
    (lambda: models.finished_folder(str(folder)), 78),
    (lambda: hf.parse_config(folder), 78),
    (lambda: data.load_tokenizer(folder), 65),
  ):
    given, said = refusal(read)
    assert given == code
    if name != "tokenizer.json" or code == 78:
      assert f"{name} is {kind}, not a file" in said


@pytest.mark.parametrize("make", MAKERS)
def test_other_inputs_are_files(tmp_path, make):
  path = tmp_path / "rows.jsonl"
  kind = make(path)
  for read, code in (
    (lambda: [*data.read_file(path)], 65),
    (lambda: label_studio.read(str(path)), 64),
    (lambda: judge.read_principles(str(path)), 64),
  ):
    given, said = refusal(read)
    assert given == code and (kind in said or "Is a directory" in said)
  registry, _ = define_flags("experiments.sft")
  given, said = refusal(lambda: flags.parse(["sft", f"--flagfile={path}"], registry))
  assert given == 64 and (kind in said or "Is a directory" in said)
