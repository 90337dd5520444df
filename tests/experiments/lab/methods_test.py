import json
import re

import pytest

from experiments.lab import methods, stages
from experiments.lab.methods import METHODS, Result

PAGES = {"README.md": ["short"], "experiments/METHODS.md": ["methods", "results"]}


def table(text, name):
  """Rows of a table of a page, as lists of cells."""
  (found,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
  return methods.read_rows(found)


def test_the_tests_of_the_table_exist(repository):
  for method in METHODS.values():
    file, _, test = method.test.partition("::")
    assert f"def {test}(" in (repository / "tests" / file).read_text(encoding="utf-8"), method


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_the_table(page, repository):
  """With their results, whatever they are."""
  text = (repository / page).read_text(encoding="utf-8")
  assert methods.fill(text, {}) == text
  marks = re.findall("<!-- (\\w+) -->", text)
  assert [name for name in marks if name in methods.TABLES] == PAGES[page]


def test_docstrings_of_scripts_say_the_win_rates_of_the_table(repository):
  page = (repository / "experiments/METHODS.md").read_text(encoding="utf-8")
  means = {row[0]: float(row[3].split(" ")[0]) for row in table(page, "results")[2:]}
  default = {
    method.command.split(" ")[0]: means[method.title] for method in [*METHODS.values()][::-1]
  }
  said = {}
  for script in default:
    text = (repository / f"experiments/{script}.py").read_text(encoding="utf-8")
    if found := re.search(r"CPU; win rate about (0\.\d+)", text):
      said[script] = float(found[1])
  assert len(said) > 8
  del said["simpo"]  # Its line of the table is held to the chosen responses.
  assert said == pytest.approx({script: default[script] for script in said}, abs=0.015)


def write(folder, name, minutes, summary=None):
  folder.mkdir(exist_ok=True)
  stages.write_record(folder, name, minutes, code=0 if summary else 70)
  if summary:
    (folder / name).mkdir()
    (folder / name / "summary.json").write_text(json.dumps(summary))


def summary(gold, rate):
  rates = {
    "gold/win_rate": rate,
    "gold/win_rate_low": rate - 0.03,
    "gold/win_rate_high": rate + 0.03,
  }
  return {"gold/mean": gold, "gold/mean_before": 4.0, "kl": 5.0, **rates}


def test_results_are_those_of_finished_runs(tmp_path):
  for seed, rate in ((0, 0.7), (1, 0.8)):
    write(tmp_path / f"seed_{seed}", "sft", 1.5, {"eval/loss": 1.0})
    write(tmp_path / f"seed_{seed}", "dpo", 2.0, summary(5.0 + seed, rate))
  write(tmp_path / "seed_0", "kto", 2.0)  # It failed.
  write(tmp_path / "seed_1", "ppo", 3.0, summary(6.0, 0.75))
  write(tmp_path / "seed_0_old", "dpo", 2.0, summary(9.0, 0.9))  # It is no seed.
  results = methods.read(tmp_path)
  assert results["dpo"][1] == pytest.approx(Result(6.0, 0.8, 0.77, 0.83, 5.0, 2.0))
  assert results["sft"][0] == Result(4.0, 0.5, 0.5, 0.5, 0.0, 1.5)
  assert not results["kto"]
  page = methods.fill("a\n<!-- results -->\n| method |\n<!-- end of results -->\nb\n", results)
  assert page.startswith("a\n") and page.endswith("\nb\n")
  _, _, sft, dpo, ppo = table(page, "results")
  assert sft == ["SFT", "4.00 / 4.00", "0.50 / 0.50", "0.50", "0.0 / 0.0", "1.5 / 1.5"]
  # The mean of two means with intervals of 0.03 is known to 0.03 / sqrt(2).
  assert dpo == ["DPO", "5.00 / 6.00", "0.70 / 0.80", "0.75 ± 0.02", "5.0 / 5.0", "2.0 / 2.0"]
  assert ppo == ["PPO", "– / 6.00", "– / 0.75", "0.75 ± 0.03", "– / 5.0", "– / 3.0"]


def test_minutes_that_are_not_known_are_a_dash(tmp_path):
  for seed, minutes in ((0, None), (1, 2.0)):
    write(tmp_path / f"seed_{seed}", "sft", 1.5, {"eval/loss": 1.0})
    write(tmp_path / f"seed_{seed}", "dpo", minutes, summary(5.0, 0.7))
  results = methods.read(tmp_path)
  page = methods.fill("<!-- results -->\n<!-- end of results -->\n", results)
  assert [row[-1] for row in table(page, "results")[2:]] == ["1.5 / 1.5", "– / 2.0"]


@pytest.mark.parametrize("name", ["results", "short"])
def test_results_of_other_methods_stay(name):
  empty = f"<!-- {name} -->\n<!-- end of {name} -->"
  of_dpo, of_kto = ({0: Result(5.0, rate, 0.6, 0.8, 4.0, 2.0)} for rate in (0.7, 0.72))
  page = methods.fill(methods.fill(empty, {"dpo": of_dpo}), {"kto": of_kto})
  assert page == methods.fill(empty, {"dpo": of_dpo, "kto": of_kto})
  assert "0.70 ± 0.10" in page and "0.72 ± 0.10" in page


def test_other_places_of_a_page_stay_as_they_are():
  page = "<!-- other -->\n| a |\n<!-- end of other -->\n"
  assert methods.fill(page, {}) == page
