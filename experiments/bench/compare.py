r"""Compares the speed of our work with the same work in other libraries; ratios are the result.

All of it, on one core (two hours; it first installs the libraries, some 3 GB):
  python -m experiments.bench.compare --cores=1 --json=compare.json
A part:
  python -m experiments.bench.compare --works=sft,dpo --peers=torch,compiled --cores=1
The table of a file:
  python -m experiments.bench.compare --show=compare.json

For each work and library two processes, ours and theirs, take turns on the same weights and tokens.
A ratio above 1 says that theirs takes longer. Both must do the same: as many params, the same
negative log-likelihood and, of the loops written by hand, the same loss at each step; as many
sampled tokens and updates. What cannot be installed, or does other work, is left out with the
reason.

The works are sft, reward_model, dpo, generate, ppo, grpo and nash_md (the last three are
iterations). The libraries:
  torch     loops written by hand on the Llama of transformers; `compiled` by torch.compile
  hf        `generate` of transformers
  trl       trainers of TRL; `trl_last` of its last release with PPO and Nash-MD
  tunix     trainers and sampler of tunix
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rlhf_jax import ranges, reporting
from rlhf_jax.models import hf
from . import measure, turns
from .shapes import Shape, part_of, set_up
from .turns import Unavailable
from .works import OPTIM

HERE = pathlib.Path(__file__).resolve().parent
WORKS = ("sft", "reward_model", "dpo", "generate", "ppo", "grpo", "nash_md")
# Spelled like this, torch is installed without the libraries of a GPU where an index offers that.
_TORCH = ("torch==2.13.0", "transformers==5.24.*")


class Peer(NamedTuple):
  """Library to compare with.

  Attributes:
    program: File in `peers/`.
    requirements: Packages that it needs.
    works: Works that it can do.
    how: Word that is added to the name of a work.
    same_loss: True if the loss of each step must be ours.
  """

  program: str
  requirements: tuple[str, ...]
  works: tuple[str, ...]
  how: str = ""
  same_loss: bool = False

  @property
  def label(self) -> str:
    """Name of the folder of its virtual environment."""
    return self.requirements[-1].replace("==", "_").replace(".*", "")


PEERS: Mapping[str, Peer] = {
  "torch": Peer("torch_by_hand.py", _TORCH, WORKS, same_loss=True),
  "compiled": Peer("torch_by_hand.py", _TORCH, WORKS, "compiled", same_loss=True),
  "hf": Peer("torch_by_hand.py", _TORCH, ("generate",), "hf"),
  "trl": Peer("trl_trainers.py", (*_TORCH, "trl==1.16.*"), ("sft", "reward_model", "dpo", "grpo")),
  "trl_last": Peer("trl_trainers.py", (*_TORCH, "requests", "trl==1.12.*"), ("ppo", "nash_md")),
  "tunix": Peer(
    "tunix_trainers.py", ("google-tunix==0.1.7",), ("sft", "dpo", "generate", "ppo", "grpo")
  ),
}
_CLOSE = 1e-4  # Relative difference of equal losses in float32.


@dataclasses.dataclass(frozen=True)
class Config(Shape):
  """Sizes, and what to compare.

  Attributes:
    works: Works to compare.
    peers: Libraries to compare with.
    cores: Number of cores that each process may use; 0 is all that this one may use.
    rounds: Timed runs of each process.
    environments: Folder of the virtual environments; made if it does not exist.
    json: File to write the results to; empty writes none.
    show: File with results to show instead of measuring.
  """

  works: tuple[str, ...] = WORKS
  peers: tuple[str, ...] = tuple(PEERS)
  cores: int = 1
  rounds: int = 5
  environments: str = "~/.cache/rlhf_jax_bench"
  json: str = ""
  show: str = ""

  def __post_init__(self):
    super().__post_init__()
    known = {"works": WORKS, "peers": PEERS}
    ranges.check(self, at_least_one=("rounds",), non_negative=("cores",), among=known)


def make_environment(folder: pathlib.Path, requirements: Sequence[str]) -> pathlib.Path:
  """Makes a virtual environment unless it is there, and returns its Python.

  Raises:
    Unavailable: The packages cannot be installed.
  """
  python, done = folder / "bin" / "python", folder / "requirements.txt"
  wanted = "\n".join(requirements) + "\n"
  if done.exists() and done.read_text(encoding="utf-8") == wanted:
    return python
  reporting.note(f"installing {' '.join(requirements)} into {folder}")
  venv.create(folder, clear=True, with_pip=True)
  command = [str(python), "-m", "pip", "install", "--quiet", *requirements]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  if result.returncode:
    raise Unavailable(
      f"pip install {' '.join(requirements)} failed: {turns.last_line(result.stderr)}"
    )
  done.write_text(wanted, encoding="utf-8")
  return python


class Side(Protocol):
  """Process that takes turns."""

  facts: Mapping[str, Any]

  def run(self) -> dict[str, Any]:
    """Runs its work once and returns the answer of `peers/protocol.py`."""


def alternate(ours: Side, theirs: Side, rounds: int, *, same_loss: bool) -> dict[str, Any]:
  """Lets two processes take turns and returns medians and ratios.

  Args:
    ours: Our process.
    theirs: Process of the library.
    rounds: Runs of each.
    same_loss: True if their losses must be equal.

  Raises:
    Unavailable: They do not do the same work.
  """
  _require_equal("facts", ours.facts, theirs.facts, ("params", "nll"))
  answers: list[tuple[dict[str, Any], dict[str, Any]]] = []
  for _ in range(rounds):
    first, second = ours.run(), theirs.run()
    names = ("generated", "updates", *(("loss",) if same_loss else ()))
    _require_equal("a run", first, second, names)
    if first.get("compiles"):
      raise measure.Recompiled(f"we compiled {first['compiles']} programs after the warm-up")
    answers.append((first, second))
  result: dict[str, Any] = {}
  for index, side in enumerate(("ours", "theirs")):
    runs = [pair[index] for pair in answers]
    result[side] = {
      name: statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_seconds")
    }
    result[side]["peak_bytes"] = max(run["peak_bytes"] for run in runs)
    result[side]["runs"] = runs
  for name in ("seconds", "cpu_seconds"):
    result[f"ratio_{name}"] = result["theirs"][name] / result["ours"][name]
  return result


def _require_equal(
  what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Sequence[str]
) -> None:
  for name in names:
    if name in ours and name in theirs:
      here, there = ours[name], theirs[name]
      if abs(here - there) > (_CLOSE * abs(here) if isinstance(here, float) else 0):
        raise Unavailable(f"does other work: {name} of {what} is {there}, ours {here}")


def write_inputs(config: Config, folder: pathlib.Path, cores: int) -> pathlib.Path:
  """Writes weights as Hugging Face folders, and a JSON file with sizes and tokens."""
  shape = part_of(config)
  setup = set_up(shape)
  ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
  params = {"policy": setup.params, "reward_model": setup.reward_params}
  for name, tree in params.items():
    hf.save_folder(folder / name, tree, shape.model, token_ids=ids)
  content = {
    "shape": dataclasses.asdict(shape),
    **{name: str(folder / name) for name in params},
    **{name: getattr(shape, name) for name in ("prompt", "response", "samples_per_prompt")},
    **{name: getattr(shape, name) for name in ("epochs", "minibatches")},
    "tokens": setup.tokens.tolist(),
    "optimizer": dataclasses.asdict(OPTIM),
    "cores": cores,
  }
  path = folder / "spec.json"
  path.write_text(json.dumps(content), encoding="utf-8")
  return path


Start = Callable[[str, Sequence[str]], contextlib.AbstractContextManager[Side]]


def compare(
  works: Sequence[str],
  peers: Mapping[str, Peer],
  command_of: Callable[[str, str], Sequence[str]],
  start: Start,
  rounds: int,
) -> tuple[dict[str, Any], dict[str, str]]:
  """Compares each work in each library that can do it.

  Args:
    works: Names of works.
    peers: Libraries by name.
    command_of: `(peer, work) -> command`; peer "ours" is our program. May raise `Unavailable`.
    start: `(name, command)`: context manager of a started program.
    rounds: Timed runs of each process.

  Returns:
    Results, and reasons of what is left out, both by "work peer".
  """
  results: dict[str, Any] = {}
  skipped: dict[str, str] = {}
  for work in works:
    for name, peer in peers.items():
      if work not in peer.works:
        continue
      pair = f"{work} {name}"
      try:
        command = command_of(name, work)
        with start("ours", command_of("ours", work)) as ours, start(name, command) as theirs:
          results[pair] = alternate(ours, theirs, rounds, same_loss=peer.same_loss)
        reporting.note(f"{pair}: {results[pair]['ratio_seconds']:.2f}")
      except Unavailable as error:
        skipped[pair] = str(error)
        reporting.note(f"{pair}: left out: {error}")
  return results, skipped


def show(content: Mapping[str, Any]) -> None:
  """Shows the table of results, in at most 80 columns."""
  rows = {
    pair: {
      "ratio": f"{result['ratio_seconds']:.2f}",
      "of CPU": f"{result['ratio_cpu_seconds']:.2f}",
      "theirs s": f"{result['theirs']['seconds']:.3g}",
      "ours s": f"{result['ours']['seconds']:.3g}",
      "theirs MiB": f"{result['theirs']['peak_bytes'] / measure.MIB:.0f}",
      "ours MiB": f"{result['ours']['peak_bytes'] / measure.MIB:.0f}",
    }
    for pair, result in content["results"].items()
  }
  reporting.show_summary("Time of theirs / ours", rows)
  for pair, reason in content["skipped"].items():
    reporting.note(f"{pair}: left out: {reason}")


def run(config: Config) -> dict[str, Any]:
  """Measures and shows what the config says; returns the content of the JSON file."""
  if config.show:
    content = json.loads(pathlib.Path(config.show).read_text(encoding="utf-8"))
    show(content)
    return content
  cores = turns.available_cores()[-config.cores :]
  environments = pathlib.Path(config.environments).expanduser()
  pythons: dict[tuple[str, ...], pathlib.Path] = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    spec = write_inputs(config, folder, len(cores))

    def command_of(name: str, work: str) -> Sequence[str]:
      if name == "ours":
        return turns.ours(spec, work)
      peer = PEERS[name]
      if peer.requirements not in pythons:
        pythons[peer.requirements] = make_environment(environments / peer.label, peer.requirements)
      called = f"{work}:{peer.how}" if peer.how else work
      python = str(pythons[peer.requirements])
      return [python, str(HERE / "peers" / peer.program), str(spec), called]

    def start(name: str, command: Sequence[str]) -> contextlib.AbstractContextManager[Side]:
      return turns.started(command, folder / f"{name}.log", cores)

    chosen = {name: PEERS[name] for name in config.peers}
    results, skipped = compare(config.works, chosen, command_of, start, config.rounds)
  content = measure.content_of(config, results=results, skipped=skipped)
  content["environment"]["cores"] = len(cores)
  show(content)
  measure.write_json(config.json, content)
  return content


if __name__ == "__main__":
  measure.run_script(run, Config)
