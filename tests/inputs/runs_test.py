"""Bad command lines, folders and workdirs, with the exit code and a word of the message.

All are started in this process, as their script starts, and end before anything is trained. None
ends in a traceback, and the message is one line.
"""

import contextlib
import errno
import json
import pathlib
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags as absl_flags

from experiments.lab import line_files
from rlhf_jax import checkpoint, data, entry, flags, loop, plots, reporting, writers
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.models import ModelConfig, build, hf
from tests.testing import refusal

GOLD, PANEL = "--reward.name=gold", "--preference.name=panel"
FEW = "--data.rows=64 --data.eval_rows=8"

# Script, its flags after --workdir, exit code, words of the message.
COMMANDS = [
  ("sft", "--step=3", 1, "did you mean --steps?"),
  ("sft", "--learning_rate=1e-4", 1, "did you mean --optim.learning_rate?"),
  ("sft", "--lr=1e-4", 1, "did you mean --optim.learning_rate?"),
  ("ppo", "--lr=1e-4", 1, "--optim.learning_rate or --critic.learning_rate?"),
  ("dpo", "--beta=0.1", 1, "did you mean --dpo.beta?"),
  ("ppo", "--kl_coef=0.1", 1, "did you mean --ppo.kl_coef?"),
  ("ppo", "--max_new_tokens=8", 1, "did you mean --sampling.max_new_tokens?"),
  ("ppo", "--temperature=1", 1, "did you mean --sampling.temperature?"),
  ("grpo", "--num_generations=8", 1, "did you mean --sampling.samples_per_prompt?"),
  ("sft", "--batch-size=8", 1, "did you mean --batch_size?"),
  ("sft", "--per_device_train_batch_size=8", 1, "did you mean --batch_size?"),
  ("sft", "--num_train_epochs=3", 1, "did you mean --epochs?"),
  ("sft", "--max_steps=3", 1, "did you mean --steps?"),
  ("sft", "--model_name_or_path=x", 1, "did you mean --model.path?"),
  ("sft", "--dataset=x", 1, "did you mean --data.path"),
  ("sft", "--report_to=wandb", 1, "did you mean --trackers?"),
  ("sft", "--sft.steps=3", 1, "did you mean --steps?"),
  ("sft", "--lora_rank=8", 1, "did you mean --lora.rank?"),
  ("sft", "--use_lora", 1, "did you mean --lora.rank?"),
  ("sft", "--packing", 1, "did you mean --data.packed_length?"),
  ("sft", "--gradient_checkpointing", 1, "did you mean --model.remat?"),
  ("sft", "--wandb", 1, "did you mean --trackers?"),
  ("sft", "--validation_file=x", 1, "did you mean --data.eval_path?"),
  ("sft", "--warmup_steps=10", 1, "did you mean --optim.warmup?"),
  ("dpo", "--loss_type=ipo", 1, "did you mean --dpo.loss?"),
  ("sft", "--init_from=", 64, "--init_from= is empty: is a shell variable in it unset?"),
  ("sft", "--model.path= --steps=3", 64, "--model.path= is empty"),
  ("dpo", "--init_from=x --data.path=", 64, "--data.path= is empty"),
  ("sft", "--data.path=x --data.eval_path=", 64, "--data.eval_path= is empty"),
  ("ppo", "--init_from=x --reward.path=", 64, "--reward.path= is empty"),
  ("ppo_max", "--ptx_path=", 64, "--ptx_path= is empty"),
  ("sft", "--init_from --steps=3", 64, "--init_from has no value: --steps=3 follows"),
  ("sft", "--data.path --init_from x", 64, "--data.path has no value: --init_from follows"),
  ("sft", "--steps=2147483648", 64, "--steps must be less than 2**31"),
  ("sft", "--steps=1_000_000_000_000_000_000_000", 64, "--steps must be less than 2**31"),
  ("sft", "--batch_size=99999999999999", 64, "--batch_size must be less than 2**31"),
  ("dpo", "--sampling.max_new_tokens=9999999999", 64, "max_new_tokens must be less than 2**31"),
  ("nash_md", "--preference.path=", 64, "--preference.path= is empty"),
  ("rlhf", "--steps=3", 1, "--sft.steps, --reward_model.steps or --ppo.steps?"),
  ("rlhf", "--init_from=x", 1, "--sft.init_from"),
  ("sft", "--xyzzy=1", 1, "unknown flag --xyzzy; --help lists the flags"),
  ("sft", "--steps = 5", 64, "--steps = 5: write --steps=5, without spaces"),
  ("sft", "--steps =5", 64, "without spaces"),
  ("sft", "--steps= 5", 64, "without spaces"),
  ("sft", "--steps=5 --steps=6", 64, "--steps is given 2 times"),
  ("sft", "steps=5", 64, "write --steps=5"),
  ("sft", "train --steps=5", 64, "stray word 'train'"),
  ("sft", "--flagfile=nowhere", 64, "--flagfile=nowhere cannot be read: No such file"),
  ("sft", "--flagfile=/", 64, "Is a directory"),
  ("sft", "--flagfile={file}", 64, "--workdir is given, and --flagfile="),
  ("sft", "--steps=1e3", 64, "--steps=1e3"),
  ("sft", "--steps=0", 64, "--steps must be at least 1"),
  ("sft", "--steps=-1", 64, "--steps must be at least 1"),
  ("sft", "--steps=", 64, "--steps="),
  ("sft", "--steps=none", 64, "--steps=none"),
  ("sft", "--batch_size=0", 64, "--batch_size must be at least 1"),
  ("sft", "--seed=-1", 64, "--seed must be in [0, 2**32), got -1"),
  ("sft", "--seed=4294967296", 64, "--seed must be in [0, 2**32)"),
  ("sft", "--seed=99999999999999999999", 64, "--seed must be in [0, 2**32)"),
  ("sft", "--seed=1.5", 64, "--seed=1.5"),
  ("sft", "--optim.learning_rate=abc", 64, "--optim.learning_rate=abc"),
  ("sft", "--optim.learning_rate=-1", 64, "--optim.learning_rate must be positive"),
  ("sft", "--optim.learning_rate=nan", 64, "must be a finite number"),
  ("sft", "--optim.learning_rate=inf", 64, "must be a finite number"),
  ("sft", "--optim.warmup=100", 64, "--optim.warmup must be in [0, 1)"),
  ("sft", "--optim.b1=1", 64, "--optim.b1 must be in [0, 1)"),
  ("sft", "--optim.schedule=step", 64, "must be one of constant, linear, cosine"),
  ("sft", "--trackers=mlflow", 64, "--trackers must be some of tensorboard, trackio, wandb"),
  ("sft", "--trackers=tensorboard,none", 64, "got 'none'"),
  ("sft", f"--mesh=data:3 {FEW}", 64, "--mesh=data:3 needs 3 devices"),
  ("sft", f"--mesh=foo:2 {FEW}", 64, "unknown axis 'foo'"),
  ("sft", f"--mesh=data:0 {FEW}", 64, "is not AXIS:SIZE"),
  ("sft", f"--mesh=2 {FEW}", 64, "is not AXIS:SIZE"),
  ("sft", f"--mesh=data:1,data:1 {FEW}", 64, "'data' is given twice"),
  ("sft", "--processes=2", 64, "--coordinator=HOST:PORT"),
  ("sft", "--coordinator=127.0.0.1 --processes=2 --process_id=0", 64, "auto or HOST:PORT"),
  ("sft", "--coordinator=127.0.0.1:7001 --processes=2 --process_id=5", 64, "--process_id must be"),
  ("sft", "--model.dtype=float16", 64, "must be one of float32, bfloat16"),
  ("sft", "--model.heads=3", 64, "--model.width 128 must be a multiple of"),
  ("sft", "--model.preset=llama4", 64, "--model.preset must be one of"),
  ("sft", "--model.layers=0", 64, "--model.layers must be at least 1"),
  ("sft", f"--lora.rank=8 {FEW}", 64, "--lora.rank adapts a trained model"),
  ("sft", "--sft.microbatches=3 --batch_size=8", 64, "--sft.microbatches=3 does not divide"),
  ("dpo", "--dpo.microbatches=5 --batch_size=8", 64, "--dpo.microbatches=5 does not divide"),
  ("reward_model", "--reward_model.microbatches=64", 64, "does not divide --batch_size=32"),
  ("ppo", f"{GOLD} --ppo.minibatches=3", 64, "minibatches"),
  ("sft", "--sampling.max_new_tokens=-3", 64, "--sampling.max_new_tokens must be at least 1"),
  ("sft", "--sampling.temperature=-1", 64, "--sampling.temperature must not be negative"),
  ("sft", "--sampling.top_p=0", 64, "--sampling.top_p must be in (0, 1]"),
  ("sft", "--data.eval_fraction=1", 64, "--data.eval_fraction must be"),
  ("sft", "--init_from=x --model.path=y", 64, "--init_from and --model.path are both given"),
  ("sft", "--model.path=x --model.preset=gpt2", 64, "--model.preset is for a new model"),
  ("sft", "--model.path=x --model.layers=2", 64, "leave out --model.layers, or --model.path"),
  ("dpo", "--init_from=x --model.width=64", 64, "leave out --model.width, or --init_from"),
  ("kto", "--init_from=x --model.mlp_width=64", 64, "leave out --model.mlp_width, or --init_from"),
  ("sft", "--model.preset=gpt2 --model.heads=2", 64, "--model.heads is a size of a new model"),
  ("ppo", "", 64, "no reward: give --reward.path=DIR or --reward.name"),
  ("ppo", f"{GOLD} --reward.weights=1,2", 64, "--reward.weights has 2 numbers for 1 rewards"),
  ("ppo", "--reward.name=helpful", 64, "--reward.name must be one of"),
  ("ppo", f"{GOLD} --sampling.temperature=0", 64, "--sampling.temperature must be positive"),
  ("nash_md", "", 64, "no preference: give --preference.path=DIR or --preference.name"),
  ("online_dpo", f"{GOLD} {PANEL}", 64, "give a reward or a preference"),
  ("rest", GOLD, 64, "--init_from is needed"),
  ("evaluate", "--policy=x", 64, "--baseline=... is needed"),
  ("evaluate", "", 64, "--policy=... and --baseline=... are needed"),
  ("generate", "", 64, "--init_from=... is needed; --init_from: Model"),
  ("evaluate", "--policy=x --baseline=x", 64, "--policy names a folder twice"),
  ("sft", "--init_from=meta-llama/Llama-3.2-1B", 78, "hf download meta-llama/Llama-3.2-1B --local"),
  ("sft", "--model.path=gpt2", 78, "there is no such folder"),
  ("evaluate", "--policy=no/x --baseline=no/y", 78, "nothing is downloaded from a hub"),
  ("ppo", f"{GOLD} --init_from=~/nowhere-at-all", 78, "/nowhere-at-all: there is no such folder"),
  ("sft", "--init_from=~nobody-of-this-name/x", 78, "~nobody-of-this-name/x"),
  ("sft", "--init_from=s3://bucket/x", 78, "s3://bucket/x is not a path of a file system"),
  ("sft", "--init_from=gs://bucket", 64, "gs://bucket: write gs://BUCKET/FOLDER"),
  ("sft", "--init_from={file}", 78, "a file; give the folder that it is in"),
]


@pytest.mark.parametrize(("script", "words", "code", "message"), COMMANDS)
def test_a_bad_command_is_refused_in_one_line(
  script, words, code, message, tmp_path, record_property
):
  record_property("bad inputs", 1)
  file = tmp_path / "file"
  file.write_text("--workdir=another\n")
  words = words.format(file=file).split(" ") if words else []
  assert_refused(script, tmp_path / "run", words, code, message)
  assert not (tmp_path / "run" / "checkpoints").exists()


def assert_refused(
  script: str, workdir: pathlib.Path | str, words: list[str], code: int, message: str
) -> None:
  given, said = refusal(script, f"--workdir={workdir}", *words)
  assert given == code, said
  assert message in said


@pytest.mark.parametrize("script", ["sft", "ppo", "rlhf", "evaluate", "plot", "label"])
def test_a_missing_workdir_is_named(script):
  code, said = refusal(script)
  assert code == 64
  assert said.startswith("--workdir=...") and "needed" in said


def _file(folder: pathlib.Path) -> pathlib.Path:
  (folder / "file").touch()
  return folder / "file"


def _dangling(folder: pathlib.Path) -> pathlib.Path:
  (folder / "link").symlink_to(folder / "nowhere")
  return folder / "link"


def _loop(folder: pathlib.Path) -> pathlib.Path:
  (folder / "loop").symlink_to(folder / "loop")
  return folder / "loop"


# How the workdir is made, exit code, words of the message.
WORKDIRS: list[tuple[Callable[[pathlib.Path], Any], int, str]] = [
  (_file, 73, "cannot be written: File exists"),
  (lambda folder: _file(folder) / "run", 73, "cannot be written: Not a directory"),
  (_dangling, 73, "cannot be written: File exists"),
  (_loop, 73, "cannot be written"),
  (lambda folder: "/proc/nothing/run", 73, "cannot be written: No such file or directory"),
  (lambda folder: folder / ("x" * 300), 73, "cannot be written: File name too long"),
  (lambda folder: folder / "lr=[1e-4]", 73, "could not be read again; give a path without"),
  (lambda folder: folder / "a\\b" / "run", 73, "with \\ in its name could not be read again"),
  (lambda folder: folder / "run*", 73, "with * in its name"),
  (lambda folder: "", 64, "--workdir is empty"),
  (lambda folder: "gs://bucket/../run", 78, "write gs://BUCKET/FOLDER"),
  (lambda folder: "s3://bucket/run", 78, "s3://bucket/run is not a path of a file system"),
  (lambda folder: "~nobody-of-this-name/run", 78, "write the folder in full"),
]


@pytest.mark.parametrize(("make", "code", "message"), WORKDIRS)
@pytest.mark.parametrize("script", ["sft", "rlhf", "evaluate"])
def test_a_workdir_that_cannot_be_is_refused(script, make, code, message, tmp_path):
  needed = {"evaluate": ["--policy=x", "--baseline=y"]}.get(script, [])
  assert_refused(script, make(tmp_path), needed, code, message)


def test_a_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert_refused("sft", "~/run", ["--init_from=nowhere"], 78, "there is no such folder")
  assert (tmp_path / "run").is_dir() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("export", [False, True])
@pytest.mark.parametrize("flag", ["--init_from", "--model.path"])
def test_a_run_in_the_folder_of_its_start_is_refused(flag, export, model_folder, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(model_folder, folder / "export" if export else folder)
  assert_refused("dpo", folder, [f"{flag}={folder}"], 64, "holds the model to start from")


def _edit(folder: pathlib.Path, name: str = "config.json", **fields: Any) -> None:
  path = folder / name
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(folder / "model.safetensors")


def _shards(folder: pathlib.Path, names: dict[str, str] | None = None) -> None:
  """Writes an index beside model.safetensors, which stays."""
  shard = "model-00001-of-00001.safetensors"
  shutil.copy(folder / "model.safetensors", folder / shard)
  named = dict.fromkeys(_tensors(folder), shard) if names is None else names
  index = {"metadata": {}, "weight_map": named}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _spoil_tensor(folder: pathlib.Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
  tensors = _tensors(folder)
  name = "model.embed_tokens.weight"
  safetensors.numpy.save_file(
    tensors | {name: change(tensors[name])}, folder / "model.safetensors", {"format": "pt"}
  )


def _only_shards(folder: pathlib.Path, names: dict[str, str]) -> None:
  _shards(folder, names)
  (folder / "model.safetensors").unlink()


def _only_adapter(folder: pathlib.Path) -> None:
  (folder / "config.json").rename(folder / "adapter_config.json")


def _run_and_model(folder: pathlib.Path) -> None:
  (folder / "export").mkdir()
  shutil.copy(folder / "config.json", folder / "export")


def _unfinished(folder: pathlib.Path) -> None:
  (folder / "config.json").unlink()
  (folder / "identity.json").write_text("{}")


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def _rename(folder: pathlib.Path, name: str) -> None:
  (folder / "model.safetensors").rename(folder / name)


def _link(folder: pathlib.Path, target: str) -> None:
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").symlink_to(target)


def _move(folder: pathlib.Path, to: str) -> None:
  files = list(folder.iterdir())
  (folder / to).mkdir(parents=True)
  for file in files:
    file.rename(folder / to / file.name)


def _twice(folder: pathlib.Path) -> None:
  text = (folder / "config.json").read_text().rstrip()
  (folder / "config.json").write_text(text.removesuffix("}") + ', "hidden_size": 99}')


# How the folder of a good model is spoiled, words of the message; the exit code is 78.
FOLDERS: list[tuple[Callable[[pathlib.Path], Any], str]] = [
  (_shards, "holds two sets of weights, model.safetensors and the shards of"),
  (lambda f: _shards(f, {}), "holds two sets of weights"),
  (lambda f: (f / "adapter_config.json").write_text("{}"), "holds weights and an adapter"),
  (_only_adapter, "an adapter without its model; merge the two"),
  (_run_and_model, "holds a model, and in export/ that of a finished run"),
  (_unfinished, "this run has not finished"),
  (_twice, "the key 'hidden_size' is given twice"),
  (lambda f: (f / "config.json").unlink(), "neither the workdir of a finished run nor a folder"),
  (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
  (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
  (lambda f: (f / "config.json").write_text("[" * 9999), "config.json: not JSON"),
  (lambda f: _edit(f, architectures=["BertModel"]), "architectures is ['BertModel']"),
  (lambda f: _edit(f, hidden_size=16), "config.json says"),
  (lambda f: _edit(f, hidden_size="8"), "hidden_size is '8', expected int"),
  (lambda f: _edit(f, hidden_size=-8), "expected a positive number"),
  (lambda f: _edit(f, num_hidden_layers=3), "is missing"),
  (lambda f: _edit(f, num_hidden_layers=1), "tensors that this model has no place for"),
  (lambda f: _edit(f, num_attention_heads=3, num_key_value_heads=2), "is not a multiple"),
  (lambda f: _edit(f, vocab_size=8), "they do not belong together"),
  (lambda f: _edit(f, rope_scaling={"type": "dynamic"}), "rope scaling 'dynamic'"),
  (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors and no index of shards"),
  (lambda f: _rename(f, "pytorch_model.bin"), "pytorch_model.bin may hold code and is not read"),
  (lambda f: _rename(f, "model-q4.gguf"), "model-q4.gguf is not read: GGUF is quantized"),
  (lambda f: _rename(f, "model.fp16.safetensors"), "rename it to model.safetensors"),
  (lambda f: _link(f, "../blobs/1"), "it is a broken link to ../blobs/1"),
  (lambda f: _link(f, "model.safetensors"), "it is a broken link to model.safetensors"),
  (lambda f: _move(f, "snapshots/abc"), "there is one in"),
  (lambda f: _move(f, "checkpoint-100"), "checkpoint-100, give that folder"),
  (lambda f: _move(f, "../elsewhere"), "neither the workdir of a finished run nor a folder"),
  (lambda f: (f / "model.safetensors").write_bytes(_POINTER), "run `git lfs pull`"),
  (lambda f: (f / "model.safetensors").write_bytes(b""), "not a readable safetensors file"),
  (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors file"),
  (lambda f: _spoil_tensor(f, lambda x: x * np.nan), "holds NaN or Inf"),
  (lambda f: _spoil_tensor(f, lambda x: x.astype(np.int32)), "weights must be floats"),
  (lambda f: _spoil_tensor(f, lambda x: x[:-1]), "gives shape"),
  (lambda f: _only_shards(f, {"a": "absent.safetensors"}), "not a readable safetensors file"),
  (lambda f: _only_shards(f, {"a": "../../etc/passwd"}), "is not a bare .safetensors file name"),
]


@pytest.mark.parametrize(("spoil", "message"), FOLDERS)
def test_a_bad_model_folder_is_refused(spoil, message, model_folder, rows_file, tmp_path):
  folder = shutil.copytree(model_folder, tmp_path / "model")
  spoil(folder)
  words = [f"--init_from={folder}", f"--data.path={rows_file}", "--batch_size=4"]
  assert_refused("sft", tmp_path / "run", words, 78, message)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_broken_chat_template_is_no_fault_of_the_rows(name, model_folder, rows_file, tmp_path):
  folder = shutil.copytree(model_folder, tmp_path / "model")
  broken = "{% for m in messages %}{{ m.content }}"
  if name.endswith("jinja"):
    (folder / name).write_text(broken)
  else:
    _edit(folder, name, chat_template=broken)
  words = [f"--init_from={folder}", f"--data.path={rows_file}", "--batch_size=4"]
  assert_refused("sft", tmp_path / "run", words, 65, "the chat template is not valid Jinja")


# What is raised somewhere in a run, exit code, words of the message.
ERRORS = [
  (
    lambda: OSError(errno.ENOSPC, "No space left on device", "/x/metrics.jsonl"),
    74,
    "/x/metrics.j",
  ),
  (lambda: OSError(errno.EDQUOT, "Disk quota exceeded"), 74, "Disk quota exceeded; make room"),
  (lambda: OSError(errno.EIO, "Input/output error", b"/x/y"), 74, "/x/y: Input/output error"),
  (lambda: OSError(errno.EROFS, "Read-only file system", "/x/plots"), 73, "/x/plots: Read-only"),
  (lambda: PermissionError(errno.EACCES, "Permission denied", "/x/plots"), 73, "Permission denied"),
  (lambda: NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/plots/y"), 73, "/x/plots/y"),
  (lambda: Exception("I/O error: No space left on device (os error 28)"), 74, "No space left on"),
  (lambda: _raised_from(OSError(errno.ENOSPC, "no")), 74, "No space left on device; make room"),
  (
    lambda: MemoryError("Unable to allocate 1.5 GiB for an array"),
    69,
    "memory for 1.5 GiB. Less is",
  ),
  (
    lambda: jax.errors.JaxRuntimeError(
      "INTERNAL: Error dispatching computation: Error dispatching computation: Out of memory"
      " allocating 104860401668 bytes."
    ),
    69,
    "A device has too little memory for 104860401668 bytes. Less is taken by ",
  ),
  (
    lambda: jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Attempting to allocate 2.50GiB. That was not possible.\nThere are 9."
    ),
    69,
    "memory for 2.50GiB. Less is taken by ",
  ),
  (KeyboardInterrupt, 130, "stopped; the same command starts again from the last checkpoint"),
  (lambda: loop.Preempted("saved step 3 of 9; run the same command to continue"), 75, "step 3"),
  (lambda: loop.NumericsError("no finite gradient"), 70, "NumericsError: no finite"),
  (lambda: checkpoint.CheckpointError("does not fit\n  item a"), 78, "does not fit   item a"),
  (lambda: checkpoint.CheckpointWriteError("step 3"), 74, "CheckpointWriteError: step 3"),
  (lambda: workdir_lib.LockedError("in use"), 73, "LockedError: in use"),
  (lambda: hf.ModelFolderError("no config.json"), 78, "ModelFolderError: no config.json"),
  (lambda: flags.UsageError("--a is 1"), 64, "--a is 1"),
  (lambda: ValueError("--a is 1"), 64, "--a is 1"),
  (lambda: absl_flags.IllegalFlagValueError("flag --a=b: no"), 64, "flag --a=b: no"),
]


def _raised_from(cause: Exception) -> Exception:
  try:
    raise RuntimeError("a writer failed") from cause
  except RuntimeError as error:
    return error


@pytest.mark.parametrize(("make", "code", "message"), ERRORS)
def test_an_error_that_is_no_bug_is_one_line(make, code, message):
  given, said = entry.verdict(make()) or (1, "")
  assert given == code
  assert message in said and "\n" not in said


def test_a_neighbour_that_has_gone_is_worth_another_start(monkeypatch):
  error = ValueError("UNKNOWN: Gloo all-reduce failed: [pair.cc:534] Connection closed by peer\nx")
  assert entry.verdict(error) is None
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  code, said = entry.verdict(error) or (1, "")
  assert code == 75
  assert said.startswith("another process of this run has gone (UNKNOWN: Gloo") and "\n" not in said


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyError("x"), OSError("x"), ValueError("x")])
def test_a_bug_keeps_its_traceback(error):
  assert entry.verdict(error) is None


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (RuntimeError("Unable to initialize backend 'tpu': no libtpu.so\nand more"), "no libtpu.so"),
    (AssertionError(), "no plugin for it is installed"),
  ],
)
def test_a_platform_without_devices_is_refused(error, words, monkeypatch, tmp_path):
  def fail():
    raise error

  monkeypatch.setattr(jax, "devices", fail)
  monkeypatch.setenv("JAX_PLATFORMS", "tpu")
  code, said = refusal("sft", f"--workdir={tmp_path / 'run'}")
  assert code == 69
  assert said.startswith("DeviceError: JAX_PLATFORMS=tpu finds no device here") and words in said
  assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
  """Files do not grow beyond 4 kB, as if the disk had no more room."""
  limits, writes = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
  sys.dont_write_bytecode = True  # Python would keep a part of a module that is imported here.
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sys.dont_write_bytecode = writes


def _metrics(folder: pathlib.Path) -> None:
  with contextlib.closing(
    writers.JsonlWriter(folder / "metrics.jsonl", resume_step=None)
  ) as writer:
    for step in range(999):
      writer.write(step, {"loss": 0.125})


def _export(folder: pathlib.Path) -> None:
  config = ModelConfig(64, width=64, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_width=8)
  shapes = jax.eval_shape(build(config, "language").init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  hf.save_folder(folder, params, config, token_ids={})


def _line(folder: pathlib.Path) -> None:
  line = plots.Line("line", np.arange(9.0), np.arange(9.0))
  plots.save_chart(folder / "plots" / "a.png", plots.Chart("a", "x", "y", [line]))


def _events(folder: pathlib.Path) -> None:
  pytest.importorskip("tensorboardX")
  with contextlib.closing(writers.make_writer(folder, ["tensorboard"])) as writer:
    for step in range(99):
      writer.table(step, "samples", [{"a": "x"}])
      writer.write(step, {f"loss/{i}": 0.125 for i in range(9)})


# What a run writes into its workdir.
WRITTEN: dict[str, Callable[[pathlib.Path], Any]] = {
  "metrics": _metrics,
  "events": _events,
  "samples": lambda f: writers.write_table(f, 1, "samples", [{"response": "x" * 9999}]),
  "summary": lambda f: reporting.write_summary(f, {f"name{i}": 1.0 for i in range(999)}),
  "plots": _line,
  "export": _export,
  "tokenizer": lambda f: data.word_level_tokenizer([f"word{i}" for i in range(999)]).save(f),
  "identity": lambda f: workdir_lib.check_identity(f, {f"--a{i}": "x" * 99 for i in range(99)}),
  "rows": lambda f: line_files.append_lines(f / "rows.jsonl", [{"a": "x" * 9999}]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_one_line_wherever_it_is_met(name, tmp_path):
  with full_disk(), pytest.raises(Exception) as e:
    WRITTEN[name](tmp_path)
  code, said = entry.verdict(e.value) or (1, "")
  assert code == 74
  assert "; make room, then start the same command again" in said


def test_a_workdir_in_use_is_left_as_it_is(tmp_path, model_folder, rows_file):
  words = [f"--init_from={model_folder}", f"--data.path={rows_file}", "--batch_size=4"]
  with workdir_lib.run_lock(tmp_path):
    before = sorted(tmp_path.iterdir())
    code, said = refusal("sft", f"--workdir={tmp_path}", *words)
    assert code == 73 and "is in use by" in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_where_a_folder_of_the_run_belongs(tmp_path):
  (tmp_path / "plots").touch()
  with pytest.raises(OSError) as e:
    _line(tmp_path)
  assert entry.verdict(e.value) == (73, f"{tmp_path / 'plots'}: File exists")
