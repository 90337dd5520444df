r"""Searches for good hyperparameters: runs trials of a script, stops poor ones, keeps the best.

DPO on the built-in task, 40 trials, two at a time on this machine:
  python -m launch.sweep --study=runs/sweep --space=dpo --trials=40 --parallel=2 \
    -- experiments.dpo --init_from=runs/sft
PPO, where a trial is stopped if the gold reward falls behind that of others:
  python -m launch.sweep --study=runs/sweep --space=ppo --trials=40 --parallel=2 \
    --prune_on=eval/gold -- experiments.ppo --init_from=runs/sft --reward.path=runs/rm \
    --eval_every=10
The same as Slurm jobs, a GPU and two hours each:
  --to=slurm --gpus=1 --minutes=120 --extra='--partition=gpu'
Every point of the grid of the space file; only settings that stay near the start:
  --sampler=grid    --constraint='kl<10'

What follows `--` is the script and the flags that all trials have in common. A trial is a run of
its own in STUDY/trials/0007. At the end STUDY has table.csv, plots/ and best/flags:
  python -m experiments.dpo --flagfile=runs/sweep/best/flags --workdir=runs/best

Starting the same command again continues a sweep that was stopped or killed; a higher --trials
adds trials. The space file is Python and is executed: use one that you have read.
launch/SWEEPS.md explains the rest.
"""

import argparse
import importlib.util
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import optuna
import sqlalchemy.exc

from . import names, sweep_report, trials
from .controller import PREEMPTED, Controller, say
from .space import Constraint, Space, SweepError, grid_points, load_space, refuse_twice


def open_study(args: argparse.Namespace, space: Space) -> optuna.Study:
  """Creates or continues the study; queues what is to be tried first. Settles `args.trials`.

  Raises:
    SweepError: The folder holds another study, or the storage cannot be reached.
  """
  args.study.mkdir(parents=True, exist_ok=True)
  if (args.study / "metrics.jsonl").exists():
    raise SweepError(f"--study={args.study} is a run; give the sweep a folder of its own")
  with trials.locked(args.study / ".lock"):
    if args.storage:
      name, storage = str(args.study.resolve()), args.storage
    else:
      backend = optuna.storages.journal.JournalFileBackend(str(args.study / "journal.log"))
      name, storage = "sweep", optuna.storages.JournalStorage(backend)
    try:
      study = optuna.create_study(
        storage=storage, study_name=name, direction=args.direction, load_if_exists=True
      )
    except ImportError as error:
      raise SweepError(
        f"--storage: {error}; for postgresql+psycopg://USER@HOST/DATABASE, pip install"
        " 'psycopg[binary]'"
      ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
      raise SweepError(f"--storage cannot be used: {error}") from error
    check_identity(study, args)
    known = study.get_trials(deepcopy=False)
    if args.sampler == "grid":
      for point in grid_points(space.grid):
        default = all(space.defaults.get(name) == value for name, value in point.items())
        study.enqueue_trial(point, {"grid": True, "default": default}, skip_if_exists=True)
    elif space.defaults and not known:
      study.enqueue_trial(space.defaults, {"default": True})
    if args.trials is None:
      args.trials = len(study.get_trials(deepcopy=False)) if args.sampler == "grid" else 20
  return study


def check_identity(study: optuna.Study, args: argparse.Namespace) -> None:
  """Refuses to continue a study with trials that could not be compared with its first ones.

  Settings that only read the trials may be corrected until the first trial has ended.
  """
  own = {
    "script": [word.removeprefix("rlhf_jax.") for word in args.script],
    "direction": args.direction,
    "metric": args.metric,
    "constraint": [constraint.text for constraint in args.constraint],
    "prune_on": args.prune_on,
    "prune_direction": args.prune_direction,
  }
  kept = study.user_attrs.get("identity", own)
  told = any(t.state.is_finished() for t in study.get_trials(deepcopy=False))
  for name in own:
    if kept[name] != own[name] and (told or name in ("script", "direction")):
      old, new = (shlex.join(v) if isinstance(v, list) else v for v in (kept[name], own[name]))
      which = "the command of the script" if name == "script" else f"--{name}"
      raise SweepError(
        f"--study={args.study} was begun with another value of {which}:\n"
        f"    {old or 'none'}\n  not\n    {new or 'none'}\n"
        "  Give the old one to continue it, or another --study to begin a new one."
      )
  study.set_user_attr("identity", own)


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line, without the usage, and exit with the code of a script."""

  def error(self, message: str) -> NoReturn:
    self.exit(os.EX_USAGE, f"{message}\nSee {self.prog} --help\n")


def _at_least(least: int) -> Callable[[str], int]:
  def read(text: str) -> int:
    try:
      number = int(text)
    except ValueError:
      number = least - 1
    if number < least:
      raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
    return number

  return read


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  command = names.as_typed("python -m launch.sweep")
  parser = _Parser(
    prog=command,
    usage=f"{command} --study=DIR --space=SPACE [flags] -- SCRIPT [flags of the script]",
    description=names.as_typed(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument_group("what is tried").add_argument
  add("--study", metavar="DIR", type=pathlib.Path, required=True, help="folder of the sweep")
  add("--space", metavar="SPACE", required=True, help="what is tried: a script, or a Python file")
  add("--trials", metavar="N", type=_at_least(1), help="trials in all (20, or the whole grid)")
  add("--sampler", choices=["tpe", "random", "grid"], default="tpe", help="who chooses (tpe)")
  add("--seed", metavar="N", type=_at_least(0), default=0, help="of the sampler (0)")
  add = parser.add_argument_group("what is good").add_argument
  add("--metric", metavar="NAME", help="figure of summary.json (that of the space file)")
  add("--direction", choices=["maximize", "minimize"], help="(that of the space file)")
  add(
    "--constraint",
    metavar="'kl<10'",
    type=Constraint.parse,
    action="append",
    default=[],
    help="bound on a figure of summary.json or metrics.jsonl; may be given several times",
  )
  add = parser.add_argument_group(
    "which trials are stopped early (successive halving)"
  ).add_argument
  add("--prune_on", metavar="NAME", default="", help="metric of metrics.jsonl; empty stops none")
  add("--prune_direction", choices=["maximize", "minimize"], help="(that of --direction)")
  add(
    "--prune_after",
    metavar="STEP",
    type=_at_least(1),
    help="first step at which trials are compared (the first one with the metric)",
  )
  add(
    "--reduction_factor",
    metavar="N",
    type=_at_least(2),
    default=3,
    help="the best one in N goes on, and is compared again at N times the steps (3)",
  )
  add = parser.add_argument_group("where trials run").add_argument
  add("--to", metavar="PLACE", default="local", help="local or slurm (local)")
  add("--parallel", metavar="N", type=_at_least(1), default=1, help="trials at a time (1)")
  add(
    "--gpus",
    metavar="N",
    type=_at_least(0),
    default=0,
    help="GPUs of each trial; 0 leaves to a local trial all that there are (0)",
  )
  add("--minutes", metavar="N", type=_at_least(0), default=0, help="time limit of a Slurm job")
  add("--extra", metavar="FLAGS", default="", help="more flags for sbatch, in one string")
  add("--storage", metavar="URL", default="", help="database of the study (a file in its folder)")
  return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Space]:
  """Reads the command line and the space file.

  Raises:
    SweepError: They ask for something impossible.
  """
  parser = make_parser()
  cut = argv.index("--") if "--" in argv else len(argv)
  args = parser.parse_args(argv[:cut])
  args.script = list(argv[cut + 1 :])
  args.script[:1] = map(names.module_of, args.script[:1])
  if args.to not in ("local", "slurm"):
    raise SweepError(f"--to={args.to}: a sweep runs its trials local or by slurm")
  if not args.script:
    raise SweepError(
      "the script is missing; write it behind the flags, as in: -- experiments.dpo --steps=100"
    )
  check_script(args.script)
  space = load_space(args.space)
  if args.sampler == "grid" and not space.grid:
    raise SweepError(f"--sampler=grid: {args.space} has no GRID = {{flag name: [values]}}")
  if args.sampler != "grid" and space.sample is None:
    raise SweepError(f"--sampler={args.sampler}: {args.space} has no function space(trial)")
  refuse_twice(space.grid if args.sampler == "grid" else space.defaults, args.script)
  args.metric = args.metric or space.metric
  if not args.metric:
    raise SweepError(f"--metric is missing, and {args.space} has no METRIC")
  args.direction = args.direction or space.direction
  args.prune_direction = args.prune_direction or args.direction
  return args, space


def check_script(script: Sequence[str]) -> None:
  """Raises SweepError if the command of the script cannot work."""
  module = script[0]
  try:
    found = importlib.util.find_spec(module) is not None
  except (ImportError, ValueError):
    found = False
  if not found:
    raise SweepError(f"there is no module {module}; write it like experiments.dpo, flags after it")
  for word in script[1:]:
    if word.split("=")[0] == "--workdir":
      raise SweepError("--workdir is not for the script: every trial gets one of its own")


def make_place(args: argparse.Namespace) -> trials.Place:
  """Makes the place where trials run."""
  if args.to == "slurm":
    return trials.Slurm(args.gpus, args.minutes, shlex.split(args.extra))
  if args.minutes or args.extra:
    raise SweepError("--minutes and --extra are for --to=slurm")
  place = trials.Local(args.study, args.gpus)
  if args.gpus * args.parallel > len(place.gpus):
    raise SweepError(
      f"--parallel={args.parallel} trials with --gpus={args.gpus} each are more than the"
      f" {len(place.gpus)} GPUs of this machine (CUDA_VISIBLE_DEVICES, or nvidia-smi, counts them)"
    )
  return place


def main(argv: Sequence[str]) -> int:
  """Runs a sweep; returns its exit code."""
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  try:
    args, space = parse(list(argv))
    place = make_place(args)
    study = open_study(args, space)
  except SweepError as error:
    print(error, file=sys.stderr)
    return os.EX_USAGE
  ended = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
  say(f"{args.study}: {ended} of {args.trials} trials have ended")
  controller = Controller(args, space, study, place)
  try:
    controller.run()
    code, message = 0, ""
  except (SweepError, trials.PlaceError) as error:
    code, message = 1, str(error)
  except KeyboardInterrupt:
    print("not waiting for them; the same command continues the sweep", file=sys.stderr)
    return PREEMPTED
  sweep_report.show(study, args.study, args.metric)
  ends = [trial.state for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
  if not code and ends and set(ends) == {optuna.trial.TrialState.FAIL}:
    code, message = 1, f"all {len(ends)} trials failed; the reasons are above, and in the logs"
  if message:
    print(message, file=sys.stderr)
  elif controller.was_stopped:
    print("stopped; the same command continues the sweep", file=sys.stderr)
    code = PREEMPTED
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
