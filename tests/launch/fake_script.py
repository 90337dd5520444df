"""A training script of a few milliseconds: the files and exit codes of a real one, without jax.

Its score is the better the nearer --x is to 0.3 and --y to 2, and shows from the first step on. It
continues where it was stopped, and notes every start and every step, so that tests can tell.
"""

import json
import os
import pathlib
import signal
import sys
import time

flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
steps, pause = int(flags.get("steps", 9)), float(flags.get("pause", 0))
x, y = float(flags.get("x", 0)), float(flags.get("y", 2))
asked: list[int] = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
with open(workdir / "starts", "a") as file:
  file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}\n")
(workdir / "flags").write_text("".join(f"--{name}={value}\n" for name, value in flags.items()))

metrics = workdir / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
score = 1 - (x - 0.3) ** 2 - 0.1 * abs(y - 2)
for step in range(done + 1, steps + 1):
  if asked:
    print(f"Preempted: saved step {step - 1}")
    sys.exit(75)
  if x > float(flags.get("fail_above", "inf")):
    print(f"\x1b[31mstep {step} went wrong")
    sys.exit(70)
  if f"{done}" in flags.get("kill_at", "").split(","):
    os.kill(os.getpid(), signal.SIGKILL)
  row = {"step": step, "eval/score": score * step / steps, "eval/loss": -score * step, "kl": 10 * x}
  with open(metrics, "a") as file:
    file.write(json.dumps(row) + "\n")
  if "kill_at" in flags and step == 3 > done:
    kill_by = int(flags.get("kill_by", signal.SIGKILL))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # As outside of the steps of a real one.
    os.kill(os.getpid(), kill_by)
  time.sleep(pause)
  while step == 3 and "hold" in flags and not (os.path.exists(flags["hold"]) or asked):
    time.sleep(0.01)
summary = {"score": "NaN" if x > float(flags.get("nan_above", "inf")) else score, "length": 7}
(workdir / "summary.json").write_text(json.dumps(summary))
