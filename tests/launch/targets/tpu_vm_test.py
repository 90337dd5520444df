"""The real gcloud, with a TPU API on this machine in the place of Google's."""

import dataclasses
import http.server
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import threading

import pytest

from launch.job import Job, JobError
from launch.targets import tpu_vm

HOSTS = 4


def job_of(**changes) -> Job:
  settings = {
    "module": "experiments.ppo",
    "flags": ("--workdir=/mnt/runs/ppo",),
    "accelerator": "v5litepod-16",
    "shared": "/mnt/runs",
    "mount": "10.0.0.2:/runs",
    "source": "git+https://github.com/me/rlhf_jax@abc123",
    "zone": "us-west4-a",
    "project": "my-project",
  }
  return Job(**settings | changes)


class _Api(http.server.BaseHTTPRequestHandler):
  """Says that everything was done, and that there is a node of four hosts."""

  def answer(self, method: str) -> None:
    size = int(self.headers.get("Content-Length") or 0)
    body = json.loads(self.rfile.read(size) or "{}")
    self.server.requests.append((method, self.path.split("?")[0], body))
    name = self.path.split("?")[0].removeprefix("/v2/")
    place = "/".join(name.split("/")[:4])  # projects/PROJECT/locations/ZONE
    reply = {"name": f"{place}/operations/done", "done": True, "response": {}}
    if name.startswith("/compute/"):
      reply = {"name": "my-project", "commonInstanceMetadata": {"items": []}, "status": "DONE"}
    elif method == "GET" and "/queuedResources/" in name:
      reply = {"name": name, "state": {"state": "ACTIVE"}}
    elif method == "GET" and "/nodes/" in name:
      ends = [
        {"ipAddress": f"10.1.0.{i}", "port": 8470, "accessConfig": {"externalIp": f"34.0.0.{i}"}}
        for i in range(HOSTS)
      ]
      reply = {"name": name, "state": "READY", "networkEndpoints": ends, "id": "7"}
    content = json.dumps(reply).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  def do_GET(self) -> None:
    self.answer("GET")

  def do_POST(self) -> None:
    self.answer("POST")

  def do_PATCH(self) -> None:
    self.answer("PATCH")

  def do_DELETE(self) -> None:
    self.answer("DELETE")

  def log_message(self, *unused) -> None:
    """Nothing on the terminal."""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
  """Runs a gcloud command line; returns its output and the requests it has sent."""
  if shutil.which("gcloud") is None:
    pytest.skip("gcloud is not installed")
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Api)
  server.requests = []
  threading.Thread(target=server.serve_forever, daemon=True).start()
  (tmp_path / "token").write_text("nobody")
  address = f"http://127.0.0.1:{server.server_port}/"
  env = os.environ | {
    "HOME": str(tmp_path),  # It makes an ssh key on first use.
    "CLOUDSDK_CONFIG": str(tmp_path / "config"),
    "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
    "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": address,
    "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{address}compute/v1/",
    "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
  }
  monkeypatch.chdir(tmp_path)

  def run(*command: str) -> tuple[str, list]:
    server.requests.clear()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + str(server.requests)
    return done.stdout + done.stderr, list(server.requests)

  yield run
  server.shutdown()
  server.server_close()


def write(plan) -> None:
  for path, text in plan.files.items():
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)


def test_one_slice_is_asked_for(gcloud):
  plan = tpu_vm.render(job_of(spot=True))
  write(plan)
  [(_, _, body)] = [one for one in gcloud(*plan.commands[0])[1] if one[0] == "POST"]
  assert "spot" in body
  [spec] = body["tpu"]["nodeSpec"]
  assert spec["nodeId"] == "ppo"
  assert spec["node"]["acceleratorType"] == "v5litepod-16"
  assert spec["node"]["runtimeVersion"] == "v2-alpha-tpuv5-lite"
  [text] = plan.files.values()
  assert spec["node"]["metadata"] == {"startup-script": text}


def test_two_slices_are_asked_for_as_one(gcloud):
  plan = tpu_vm.render(job_of(slices=2))
  write(plan)
  [(_, _, body)] = [one for one in gcloud(*plan.commands[0])[1] if one[0] == "POST"]
  assert "spot" not in body
  [spec] = body["tpu"]["nodeSpec"]
  assert spec["multisliceParams"] == {"nodeCount": 2, "nodeIdPrefix": "ppo"}
  assert {"hosts of ppo-0", "hosts of ppo-1"} <= plan.later.keys()


def test_looks_at_every_host(gcloud):
  command = shlex.split(tpu_vm.render(job_of()).later["hosts of ppo"])
  output, _ = gcloud(*command, "--dry-run")
  lines = [line for line in output.splitlines() if re.search(r"/ssh .*@34\.0\.0\.\d ", line)]
  assert len(lines) == HOSTS
  for line in lines:
    assert line.endswith("-- systemctl status rlhf_jax")


def test_state_and_end(gcloud):
  later = tpu_vm.render(job_of()).later
  assert gcloud(*shlex.split(later["state"]))[0] == "ACTIVE\n"
  _, requests = gcloud(*shlex.split(later["stop, and stop paying"]))
  assert [path.rpartition("/")[2] for method, path, _ in requests if method == "DELETE"] == ["ppo"]


_STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"{log}"
case "$(basename "$0")" in
  mountpoint) [ -e "{log}.mounted" ] ;;
  mount) touch "{log}.mounted" ;;
esac
"""


@pytest.fixture
def host(tmp_path):
  """Makes a host of a job; returns a function that boots it and says which programs were called."""

  def make(job: Job):
    [script] = tpu_vm.render(job).files.values()
    for folder in ("/opt/rlhf_jax", "/etc/systemd/system", "/mnt/runs"):
      script = script.replace(folder, f"{tmp_path}{folder}")
      (tmp_path / folder[1:]).mkdir(parents=True)
    log, stubs = tmp_path / "log", tmp_path / "stubs"
    stubs.mkdir()
    for name in ("mountpoint", "mount", "mount.nfs", "python3", "systemctl", "apt-get"):
      (stubs / name).write_text(_STUB.format(log=log))
      (stubs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"}

    def boot() -> list[str]:
      log.write_text("")
      subprocess.run(["bash", "-c", script], env=env, check=True)
      return log.read_text().splitlines()

    return boot

  return make


def test_a_host_mounts_installs_and_starts_also_after_a_reboot(host, tmp_path):
  boot = host(job_of(flags=("--workdir=/mnt/runs/ppo", "--init_from=a b")))
  first = boot()
  assert f"mount -t nfs -o hard 10.0.0.2:/runs {tmp_path}/mnt/runs" in first
  assert any("rlhf_jax[tpu] @ git+https://github.com/me/rlhf_jax@abc123" in line for line in first)
  assert first[-2:] == ["systemctl daemon-reload", "systemctl restart rlhf_jax.service"]
  (tmp_path / "log.mounted").unlink()  # As a reboot does.
  again = boot()
  assert any(line.startswith("mount -t nfs") for line in again)
  assert not any(line.startswith("python3") for line in again)
  assert again[-1] == "systemctl restart rlhf_jax.service"

  python = tmp_path / "opt/rlhf_jax/bin/python"
  python.parent.mkdir()
  python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  unit = (tmp_path / "etc/systemd/system/rlhf_jax.service").read_text()
  command = shlex.split(re.search("^ExecStart=(.*)", unit, re.M)[1])
  told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
  wanted = ["--workdir=/mnt/runs/ppo", "--init_from=a b", "--coordinator=auto"]
  assert told == [
    "-m",
    "experiments.ppo",
    *(w.replace("/mnt/runs", f"{tmp_path}/mnt/runs") for w in wanted),
  ]


def test_a_host_that_works_in_a_bucket_mounts_nothing(host, tmp_path):
  flags = ("--workdir=gs://bucket/ppo",)
  job = job_of(flags=flags, accelerator="v5litepod-8", shared="", mount="")
  lines = host(job)()
  assert not any(line.startswith(("mount", "apt-get")) for line in lines)
  assert lines[-1] == "systemctl restart rlhf_jax.service"
  assert "--workdir=gs://bucket/ppo" in (tmp_path / "opt/rlhf_jax/job.sh").read_text()
  with pytest.raises(JobError, match="--to=tpu_vm needs --mount"):  # For what lies on it.
    tpu_vm.render(dataclasses.replace(job, source="/mnt/runs/rlhf_jax.whl"))


@pytest.mark.parametrize("restarts", [0, 3])
def test_systemd_understands_the_unit(tmp_path, restarts):
  if shutil.which("systemd-analyze") is None:
    pytest.skip("systemd-analyze is not installed")
  [script] = tpu_vm.render(job_of(restarts=restarts)).files.values()
  unit = tmp_path / "rlhf_jax.service"
  unit.write_text(re.search(r"^UNIT='(.*?)'$", script, re.M | re.S)[1])
  checked = subprocess.run(
    ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
  )
  assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"accelerator": "tpu7x-8"}, "tpu7x-8 exists on GKE only, use --to=xpk"),
    ({"accelerator": "H100:8"}, "H100:8 is no TPU"),
    ({"mount": ""}, "--to=tpu_vm needs --mount, such as 10.0.0.2:/runs"),
    (
      {"flags": ("--workdir=/home/me/ppo",)},
      "--workdir=/home/me/ppo is not inside --shared=/mnt/r",
    ),
    ({"flags": ("--workdir=/mnt/runs/../ppo",)}, "is not inside --shared=/mnt/runs"),
    ({"source": "/mnt/runs/rlhf_jax"}, "--source=/mnt/runs/rlhf_jax is neither git+https://"),
    ({"image": "x"}, "--image means nothing for --to=tpu_vm; leave it out"),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(JobError, match=re.escape(message)):
    tpu_vm.render(job_of(**changes))
