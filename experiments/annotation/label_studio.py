"""Converts pairs to tasks of Label Studio's pairwise template, and its JSON export to answers.

https://labelstud.io/templates/pairwise_comparison, https://labelstud.io/guide/task_format
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rlhf_jax import data, reporting
from rlhf_jax import workdir as workdir_lib
from .items import Item, answer_row, shown_order

_TASKS, _INTERFACE = "label_studio.json", "label_studio.xml"
# The pairwise tag knows no tie. A click on the chosen response takes the choice back.
_TEMPLATE = """\
<View>
  <Header value="Which response is better? Click it again to clear it, before a tie."/>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1em">
    <Text name="answer1" value="$answer1"/>
    <Text name="answer2" value="$answer2"/>
  </View>
  <Choices name="tie" toName="prompt" choice="single-radio">
    <Choice value="tie"/>
  </Choices>
</View>
"""
_SIDES = {"left": (0, 1), "right": (1, 0)}  # Ranks of answer1 and answer2.


def export(items: Sequence[Item], workdir: pathlib.Path) -> None:
  """Writes the pairs as tasks to import in Label Studio, and the labelling interface to paste.

  Raises:
    DataError: An item is not a pair.
  """
  tasks = [make_task(item) for item in items]
  workdir_lib.atomic_write(workdir / _TASKS, json.dumps(tasks, indent=1) + "\n")
  workdir_lib.atomic_write(workdir / _INTERFACE, _TEMPLATE)
  reporting.note(f"{len(tasks)} tasks are in {workdir / _TASKS}; {_INTERFACE} is their interface")


def make_task(item: Item) -> dict[str, Any]:
  """Makes the task of a pair in the order of `shown_order`, which is stored in `shown`."""
  if len(item.responses) != 2:
    raise data.DataError(
      f"the row {item.id!r} has {len(item.responses)} responses, and the pairwise template of"
      " Label Studio compares two; rank them with experiments.label_page"
    )
  order = shown_order(item.prompt, item.responses)
  first, second = (item.responses[i] for i in order)
  texts = {"prompt": item.prompt, "answer1": first, "answer2": second}
  return {"data": {"id": item.id, "shown": list(order), **texts}}


def read(path: str, items: Sequence[Item] = ()) -> list[dict[str, Any]]:
  """Reads the answers of an export, of tasks from `export` or others of the same template.

  Args:
    path: JSON export: a list of tasks with `data` and `annotations`.
    items: Items of the data; a task with the id of an item must have its texts.

  Raises:
    DataError: The file is not such an export.
  """
  if kind := workdir_lib.kind_of(path):
    raise data.DataError(f"--answers={path} is {kind}, not a file")
  try:
    content = workdir_lib.local_path(path).read_text(encoding="utf-8-sig")
    tasks = json.loads(content)
  except OSError as error:
    raise data.DataError(f"--answers={path}: {error.strerror}") from error
  except ValueError as error:
    raise data.DataError(f"--answers={path} is not JSON: {error}") from error
  if not isinstance(tasks, list):
    raise data.DataError(f"--answers={path}: expected a list of tasks; export as JSON")
  known = {item.id: item for item in items}
  rows, contradictory = [], []
  for number, task in enumerate(tasks):
    where = f"{path}: task {number}"
    item, order = _item(task, number, where)
    of_row = known.get(item.id, item)  # Keeps the turns of its prompt.
    if of_row[:3] != item[:3]:
      _fail(where, f"its texts are not those of the row {item.id!r} of --data.path", "match them")
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
      _fail(where, "no list of annotations", "export as JSON, not as JSON-MIN")
    for annotation in annotations:
      choices, annotator = _choices(annotation, where), _annotator(annotation)
      if len(set(choices)) > 1:  # The export does not tell which came last.
        contradictory.append(f"{item.id} by {annotator}")
        continue
      in_row = [choices[0][order.index(i)] for i in range(2)] if choices else None
      columns = {"shown": list(order)}
      if isinstance(annotation.get("lead_time"), (int, float)):
        columns["seconds"] = round(annotation["lead_time"], 1)
      rows.append(answer_row(of_row, annotator, in_row, **columns))
  if contradictory:
    fix = "clear one of the two in Label Studio, and export again"
    _fail(path, f"both a response and a tie are chosen in {', '.join(contradictory)}", fix)
  return rows


def _item(task: Any, number: int, where: str) -> tuple[Item, tuple[int, ...]]:
  """Reads the pair of a task, and the indices of its responses on the left and on the right."""
  columns = task.get("data") if isinstance(task, Mapping) else None
  if not isinstance(columns, Mapping):
    _fail(where, "no `data`", "export as JSON, not as JSON-MIN")
  for name in ("prompt", "answer1", "answer2"):
    if not isinstance(columns.get(name), str):
      _fail(where, f"data.{name} is not a text", "label prompt, answer1 and answer2")
  order = tuple(columns.get("shown", (0, 1)))
  if sorted(order) != [0, 1]:
    _fail(where, "data.shown is neither [0, 1] nor [1, 0]", "remove it if the task is not ours")
  answers = columns["answer1"], columns["answer2"]
  texts = answers[order.index(0)], answers[order.index(1)]
  return Item(str(columns.get("id", task.get("id", number))), columns["prompt"], texts), order


def _choices(annotation: Any, where: str) -> list[tuple[int, int]]:
  """Ranks of answer1 and answer2 by each choice; none if the task was skipped or left open."""
  if not isinstance(annotation, Mapping) or not isinstance(annotation.get("result"), list):
    _fail(where, "an annotation without a list `result`", "export it again")
  if annotation.get("was_cancelled"):
    return []
  chosen = []
  for part in annotation["result"]:
    value = part.get("value", {})
    if part.get("type") == "choices" and "tie" in value.get("choices", ()):
      chosen.append((0, 0))
    if part.get("type") == "pairwise":
      side = value.get("selected")
      if side not in _SIDES:
        _fail(where, f"selected is {side!r}", "expected left or right")
      chosen.append(_SIDES[side])
  return chosen


def _annotator(annotation: Mapping[str, Any]) -> str:
  """Name of the annotator: Label Studio gives a number, or an object with an e-mail address."""
  who = annotation.get("completed_by")
  if isinstance(who, Mapping):
    who = who.get("email") or who.get("id")
  return "label_studio" if who is None else str(who)


def _fail(where: str, problem: str, fix: str) -> NoReturn:
  raise data.DataError(f"{where}: {problem}; {fix}")
