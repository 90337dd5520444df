"""Tasks for Label Studio, and its answers, by the script."""

import dataclasses
import json

from experiments import label_studio
from rlhf_jax import loop, simulation
from rlhf_jax.data import DataConfig


def test_tasks_and_their_answers(tmp_path, capsys):
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in simulation.preferences("eval", 24, 0)))
  config = label_studio.Config(limit=4, data=DataConfig(path=str(path)))
  session = loop.Session(str(tmp_path / "out"))
  label_studio.exchange(session, config)
  tasks = json.loads((tmp_path / "out" / "label_studio.json").read_text())
  assert len(tasks) == 4
  for task in tasks:
    chosen = {"type": "pairwise", "value": {"selected": "left"}}
    task["annotations"] = [{"completed_by": 7, "result": [chosen]}]
  export = tmp_path / "export.json"
  export.write_text(json.dumps(tasks))
  for new in (4, 0):
    summary = label_studio.exchange(session, dataclasses.replace(config, answers=str(export)))
    assert f"{new} answers are new" in capsys.readouterr().err
  lines = (tmp_path / "out" / "labels.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["annotations"][0]["preferred"] for row in rows] == [row["shown"][0] for row in rows]
  assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
  assert summary["answers"] == 4 and "agreement/7/label" in summary
