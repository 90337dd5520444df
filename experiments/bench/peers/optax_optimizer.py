"""Optimizer of the trainers of tunix, with the settings of ours."""

import optax


def optimizer_of(spec):
  settings = spec["optimizer"]
  return optax.chain(
    optax.clip_by_global_norm(settings["max_grad_norm"]),
    optax.adamw(
      settings["learning_rate"],
      b1=settings["b1"],
      b2=settings["b2"],
      eps=settings["eps"],
      weight_decay=0.0,
    ),
  )
