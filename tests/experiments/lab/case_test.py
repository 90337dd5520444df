"""Work of the programs that are compiled for absent devices."""

import numpy as np
import pytest

from experiments.lab import costs
from experiments.lab.case import Case
from rlhf_jax.algorithms.kto import KTOBatch
from rlhf_jax.types import UnpairedBatch


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_work_of_kto_is_what_a_run_counts(remat, open_bench):
  """And with remat what it computes again, which is nothing where no gradient flows."""
  bench, works = open_bench("kto", "unpaired", f"--model.remat={remat}"), {}

  def check(name, program, *inputs, work=None, held=None):
    works[name] = work
    return np.zeros((8, 2), np.float32)

  case = Case(check, bench, None)
  rows = UnpairedBatch(*case.tokens(case.length), case.column(), case.tokens(case.length))
  trainer = bench.trainer(lambda *args, **kwargs: None)
  case.against_reference(trainer, None, rows, KTOBatch)
  counted = costs.training_flops(bench.model.config, rows, scored=case.scored)
  forward = works["reference"].flops / 2
  assert counted == 4 * forward
  assert works["train"].flops == counted + (remat == "full") * forward
