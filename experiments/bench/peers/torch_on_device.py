"""SFT steps and sampling in torch on a GPU, with random weights; times itself.

It is started with a JSON file of sizes and the name of the work, and writes one JSON line. Params
are float32 under autocast for SFT, bfloat16 for sampling. TORCH_DEVICE names another device.
"""

import json
import os
import sys
import time

import torch
import torch_by_hand
from transformers import LlamaConfig, LlamaForCausalLM


def load(spec, kind):
  shape = spec["shape"]
  config = LlamaConfig(
    vocab_size=shape["vocab_size"],
    hidden_size=shape["width"],
    intermediate_size=shape["mlp_width"],
    num_hidden_layers=shape["layers"],
    num_attention_heads=shape["heads"],
    num_key_value_heads=shape["kv_heads"] or shape["heads"],
    max_position_embeddings=2 * (shape["prompt"] + shape["response"]),
    tie_word_embeddings=False,
    attn_implementation="sdpa",
  )
  model = LlamaForCausalLM(config)
  return model.to(getattr(torch, spec["params_dtype"]))


def timed(run, rounds):
  """Seconds of each run after two as a warm-up."""
  seconds = []
  for n in range(2 + rounds):
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    if n >= 2:
      seconds.append(time.perf_counter() - start)
  return seconds


def synchronize():
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def main():
  path, work = sys.argv[1:]
  with open(path, encoding="utf-8") as file:
    spec = json.load(file)
  device = os.environ.get("TORCH_DEVICE", "cuda")
  if device == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
  torch.set_default_device(device)
  torch.manual_seed(0)
  shape, dtype = spec["shape"], spec["shape"]["dtype"]
  spec["params_dtype"] = "float32" if work == "sft" else dtype
  length = shape["prompt"] + shape["response"]
  tokens = torch.randint(shape["vocab_size"], (shape["batch_size"], 1, length))
  spec |= {"tokens": tokens.tolist()}
  spec |= {name: shape[name] for name in ("prompt", "response")}
  torch_by_hand.load = load
  result = {}
  if work == "sft":
    run = torch_by_hand.sft(torch_by_hand.Program(spec, False))
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
      result["seconds"] = timed(run, spec["rounds"])
  else:
    result["seconds"] = timed(generate(spec), spec["rounds"])
    prefill = timed(generate(spec | {"response": 1}), spec["rounds"])
    result["prefill"] = sorted(prefill)[len(prefill) // 2]
  peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
  print(json.dumps(result | {"peak_bytes": peak}))


def generate(spec):
  return torch_by_hand.generate(torch_by_hand.Program(spec, False))


if __name__ == "__main__":
  main()
