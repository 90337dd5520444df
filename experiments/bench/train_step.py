r"""Times train steps: SFT, reward model, DPO, KTO, and the updates of PPO and Nash-MD.

All methods (ten minutes on one core):
  python -m experiments.bench.train_step
Some, with a large vocabulary:
  python -m experiments.bench.train_step --works=sft,dpo --vocab_size=128000 --json=steps.json

Long prompts, each of which is run for each response, not once for both:
  python -m experiments.bench.train_step --works=dpo --prompt=1024 --noshare_prompts

DPO and KTO include the forward pass of the reference, PPO all epochs. The names are sft,
reward_model, dpo, kto, ppo and nash_md.
"""

from . import timed, works

if __name__ == "__main__":
  timed.run("Train steps", works.TRAIN_STEPS)
