import json

import jax
import pytest

from rlhf_jax.models import build, count_params, hf
from rlhf_jax.models.presets import PRESETS

# As the model cards and the headers of the published safetensors count them.
PARAMETERS = {
  "llama3_8b": 8_030_261_248,
  "llama3_1b": 1_235_814_400,
  "smollm2_135m": 134_515_008,
  "qwen2_5_0_5b": 494_032_768,
  "qwen2_5_7b": 7_615_616_512,
  "qwen3_8b": 8_190_735_360,
  "mistral_7b": 7_248_023_552,
  "mixtral_8x7b": 46_702_792_704,
  "qwen3_30b_a3b": 30_532_122_624,
  "gemma2_2b": 2_614_341_888,
  "gemma3_1b": 999_885_952,
  "gpt2": 124_439_808,
  "phi3_mini": 3_821_079_552,
}


def test_every_preset_has_a_known_size():
  assert PARAMETERS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name):
  shapes = jax.eval_shape(build(PRESETS[name]).init, jax.random.key(0))
  assert count_params(shapes) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_folder_can_say_every_preset(name, tmp_path):
  raw = hf.config_json(PRESETS[name], "language", {})
  (tmp_path / "config.json").write_text(json.dumps(raw))
  assert hf.parse_config(tmp_path) == (PRESETS[name], "language")
