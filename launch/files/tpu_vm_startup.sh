# Runs as root on every host of a TPU VM, at each boot, after the settings of the job.
set -euo pipefail

mount_shared() {
  [ -n "$MOUNT" ] || return 0
  mountpoint -q "$SHARED" && return
  command -v mount.nfs >/dev/null || { apt-get update -q; apt-get install -qy nfs-common; }
  mkdir -p "$SHARED"
  mount -t nfs -o hard "$MOUNT" "$SHARED"
}

install_job() {
  [ -e "$FOLDER/installed" ] && return
  # The Python of the image may be too old; uv brings one.
  python3 -m pip install --quiet uv
  python3 -m uv venv --clear --python 3.12 "$FOLDER"
  python3 -m uv pip install --python "$FOLDER/bin/python" "rlhf_jax[tpu] @ $SOURCE"
  touch "$FOLDER/installed"
}

start_job() {
  printf '#!/bin/bash\n%s\n' "$JOB" >"$FOLDER/job.sh"
  printf '%s\n' "$UNIT" >"/etc/systemd/system/$SERVICE.service"
  systemctl daemon-reload
  systemctl restart "$SERVICE.service"
}

mount_shared
install_job
start_job
