import pytest

from launch import accelerators
from launch.accelerators import find


@pytest.mark.parametrize(
  "name, topology, chips, hosts, devices",
  [
    ("v4-8", "v4:2x2x1", 4, 1, 4),
    ("v5litepod-1", "v5e:1x1", 1, 1, 1),
    ("v5litepod-8", "v5e:2x4", 8, 1, 8),
    ("v5litepod-16", "v5e:4x4", 16, 4, 16),
    ("v5p-256", "v5p:4x4x8", 128, 32, 128),
    ("v6e-256", "v6e:16x16", 256, 64, 256),
    ("tpu7x-16", "tpu7x:2x2x2", 8, 2, 16),
    ("H100:8", "", 8, 1, 8),
  ],
)
def test_known(name, topology, chips, hosts, devices):
  found = find(name)
  assert (found.topology, found.chips, found.hosts) == (topology, chips, hosts)
  assert found.devices == devices
  assert found.is_tpu == bool(topology)


def test_names_are_unique_and_their_own():
  slices = [one for one in accelerators.GENERATIONS.values() for _ in one.topologies]
  assert len(accelerators.SLICES) == len(slices)
  for name, found in accelerators.SLICES.items():
    assert find(name) is found
    assert found.name == name
    assert found.chips % found.hosts == 0 and found.gke


@pytest.mark.parametrize(
  "name, hint",
  [
    ("v5e-16", "did you mean v5litepod-16?"),
    ("v5e:4x4", "did you mean v5litepod-16?"),
    ("v5litepod16", "did you mean v5litepod-16?"),
    ("V5P-256", "did you mean v5p-256?"),
    ("H100", "did you mean H100:8?"),
    ("h100:8", "did you mean H100:8?"),
    ("H100:3", "did you mean H100:8?"),
    ("v6e-10", "there are v6e-1, v6e-4, v6e-8, v6e-16, v6e-32, v6e-64, v6e-128, v6e-256"),
    ("gpu", "or a GPU as MODEL:COUNT, such as H100:8"),
  ],
)
def test_unknown(name, hint):
  with pytest.raises(ValueError, match=f"^accelerator={name} is not known; ") as error:
    find(name)
  assert str(error.value).endswith(hint)
