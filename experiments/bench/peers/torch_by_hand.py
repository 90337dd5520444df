"""Training loops written by hand in torch, with the Llama of transformers.

Logits are computed at scored positions only, each model has one cache, AdamW is fused, and the
log-probabilities of sampled tokens are kept by the sampler.
"""

import functools
import sys

import protocol
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache

KL, MIX, TAU = 0.1, 0.25, 0.01
GRPO_KL = 0.04


def load(spec, kind):
  path = spec[kind]
  auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
  return auto.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")


def optimizer_of(spec, *models):
  params = [p for model in models for p in model.parameters()]
  settings = spec["optimizer"]
  tx = torch.optim.AdamW(
    params,
    lr=settings["learning_rate"],
    betas=(settings["b1"], settings["b2"]),
    eps=settings["eps"],
    weight_decay=0.0,
    fused=True,
  )
  return params, tx


def token_logprobs(model, tokens, first):
  """Log-probabilities [B, T - first] of tokens from position `first`, at least 1."""
  hidden = model.model(tokens, use_cache=False).last_hidden_state[:, first - 1 : -1]
  logits = model.lm_head(hidden)
  targets = tokens[:, first:]
  nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
  return -nll.view(targets.shape)


def values(model, tokens):
  """Scores [B, T] of a model with a scalar head."""
  return model.score(model.model(tokens, use_cache=False).last_hidden_state)[..., 0]


class Program:
  """The models of one work, its optimizer and its batch."""

  def __init__(self, spec, compiled):
    self.spec = spec
    self.compile = functools.partial(torch.compile, dynamic=False) if compiled else lambda f: f
    self.tokens = torch.tensor(spec["tokens"])  # [B, 2, T]
    self.prompt = spec["prompt"]

  def prompts(self, samples=1):
    """Prompts [B / samples, P]."""
    return self.tokens[: len(self.tokens) // samples, 0, : self.prompt]

  def trains(self, *models):
    self.params, self.tx = optimizer_of(self.spec, *models)

  def update(self, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.params, self.spec["optimizer"]["max_grad_norm"])
    self.tx.step()
    self.tx.zero_grad(set_to_none=True)
    return loss.item()


def sft(program):
  policy, tokens = load(program.spec, "policy"), program.tokens[:, 0]
  program.trains(policy)
  loss_of = program.compile(lambda: -token_logprobs(policy, tokens, 1).mean())
  return lambda: {"loss": program.update(loss_of()), "updates": 1}


def reward_model(program):
  model, tokens = load(program.spec, "reward_model"), program.tokens.flatten(0, 1)
  program.trains(model)

  def loss_of():
    scores = values(model, tokens)[:, -1].view(-1, 2)
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()

  loss_of = program.compile(loss_of)
  return lambda: {"loss": program.update(loss_of()), "updates": 1}


def dpo(program):
  policy, reference = load(program.spec, "policy"), load(program.spec, "policy")
  tokens = program.tokens.flatten(0, 1)
  program.trains(policy)

  def totals(model):
    return token_logprobs(model, tokens, program.prompt).sum(1).view(-1, 2)

  of_policy = program.compile(lambda: totals(policy))
  of_reference = program.compile(lambda: totals(reference))

  def run():
    with torch.no_grad():
      ref = of_reference()
    margin = of_policy() - ref
    loss = -F.logsigmoid(0.1 * (margin[:, 0] - margin[:, 1])).mean()
    return {"loss": program.update(loss), "updates": 1}

  return run


class Sampler:
  """Samples responses from a model, or from the geometric mixture of two, a cache for each."""

  def __init__(self, program, *models, samples=1):
    self.models, self.samples, self.new = models, samples, program.spec["response"]
    self.draw = program.compile(self.draw)

  def draw(self, *logits):
    """Token [B, 1] and its log-probability."""
    if len(logits) == 1:
      probs = torch.softmax(logits[0], -1)
    else:
      first, second = (torch.log_softmax(x, -1) for x in logits)
      probs = torch.softmax((1 - MIX) * first + MIX * second, -1)
    token = torch.multinomial(probs, 1)
    return token, probs.gather(1, token).log()

  @torch.no_grad()
  def __call__(self, prompts):
    """Sequences [B * N, P + R] and log-probabilities [B * N, R] of their responses."""
    caches = [DynamicCache(config=model.config) for model in self.models]
    token, tokens, logprobs = prompts, [prompts.repeat_interleave(self.samples, 0)], []
    for n in range(self.new):
      logits = []
      for model, cache in zip(self.models, caches, strict=True):
        hidden = model.model(token, cache=cache, use_cache=True).last_hidden_state[:, -1]
        logits.append(model.lm_head(hidden))
        if n == 0 and self.samples > 1:
          logits[-1] = logits[-1].repeat_interleave(self.samples, 0)
          cache.batch_repeat_interleave(self.samples)
      token, logprob = self.draw(*logits)
      tokens.append(token)
      logprobs.append(logprob)
    if caches[0].get_seq_length() != prompts.shape[1] + self.new - 1:
      sys.exit("this release of transformers does not read `cache`; install transformers==5.24.*")
    return torch.cat(tokens, 1), torch.cat(logprobs, 1)


def generate(program):
  sample, prompts = Sampler(program, load(program.spec, "policy")), program.prompts()
  return lambda: {"generated": count(sample(prompts)[1])}


def hf(program):
  policy, prompts = load(program.spec, "policy"), program.prompts()
  new = program.spec["response"]
  options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
  policy.generation_config.eos_token_id = None

  def run():
    mask = torch.ones_like(prompts)
    tokens = policy.generate(
      prompts, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **options
    )
    return {"generated": count(tokens[:, prompts.shape[1] :])}

  return run


def count(tokens):
  return tokens.numel()


def gae(rewards, values, lam=0.95):
  advantages, last = torch.zeros_like(rewards), torch.zeros(len(rewards))
  following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
  for t in reversed(range(rewards.shape[1])):
    last = rewards[:, t] + following[:, t] - values[:, t] + lam * last
    advantages[:, t] = last
  return advantages, advantages + values


def clipped(logprobs, old, advantages):
  ratio = torch.exp(logprobs - old)
  return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def ppo(program):
  spec, first = program.spec, program.prompt
  policy, reference = load(spec, "policy"), load(spec, "policy")
  critic, reward = load(spec, "reward_model"), load(spec, "reward_model")
  sample, prompts = Sampler(program, policy), program.prompts()
  program.trains(policy, critic)
  logprobs_of = program.compile(lambda model, tokens: token_logprobs(model, tokens, first))
  values_of = program.compile(lambda model, tokens: values(model, tokens)[:, first - 1 : -1])
  scores_of = program.compile(lambda tokens: values(reward, tokens)[:, -1])

  @program.compile
  def loss_of(tokens, old, old_values, advantages, returns):
    now = values(critic, tokens)[:, first - 1 : -1]
    near = old_values + (now - old_values).clamp(-0.2, 0.2)
    value_loss = 0.5 * torch.maximum((now - returns) ** 2, (near - returns) ** 2).mean()
    logprobs = token_logprobs(policy, tokens, first)
    return clipped(logprobs, old, advantages).mean() + 0.5 * value_loss

  def run():
    tokens, old = sample(prompts)
    with torch.no_grad():
      rewards = -KL * (old - logprobs_of(reference, tokens))
      rewards[:, -1] += scores_of(tokens)
      old_values = values_of(critic, tokens)
      advantages, returns = gae(rewards, old_values)
      advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    updates = 0
    for _ in range(spec["epochs"]):
      for rows in torch.randperm(len(tokens)).chunk(spec["minibatches"]):
        batch = tokens, old, old_values, advantages, returns
        program.update(loss_of(*(x[rows] for x in batch)))
        updates += 1
    return {"generated": count(old), "updates": updates}

  return run


def grpo(program):
  spec, first = program.spec, program.prompt
  policy, reference = load(spec, "policy"), load(spec, "policy")
  samples = spec["samples_per_prompt"]
  sample, prompts = Sampler(program, policy, samples=samples), program.prompts(samples)
  program.trains(policy)
  reference_of = program.compile(lambda tokens: token_logprobs(reference, tokens, first))

  @program.compile
  def loss_of(tokens, old, ref, advantages):
    logprobs = token_logprobs(policy, tokens, first)
    apart = ref - logprobs
    return (clipped(logprobs, old, advantages) + GRPO_KL * (apart.exp() - apart - 1)).mean()

  def run():
    tokens, old = sample(prompts)
    scores = (tokens[:, first:] % 2 == 0).float().mean(1).view(-1, samples)
    advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    with torch.no_grad():
      ref = reference_of(tokens)
    program.update(loss_of(tokens, old, ref, advantages.view(-1, 1)))
    return {"generated": count(old), "updates": 1}

  return run


def nash_md(program):
  spec, first = program.spec, program.prompt
  policy, reference = load(spec, "policy"), load(spec, "policy")
  reward, prompts = load(spec, "reward_model"), program.prompts()
  sample, sample_mixture = Sampler(program, policy), Sampler(program, policy, reference)
  program.trains(policy)
  reference_of = program.compile(lambda tokens: token_logprobs(reference, tokens, first))
  scores_of = program.compile(lambda tokens: values(reward, tokens)[:, -1])

  @program.compile
  def loss_of(tokens, ref, preference):
    logprobs = token_logprobs(policy, tokens, first)
    gain = preference - 0.5 - TAU * (logprobs.detach() - ref).sum(1)
    return -(gain * logprobs.sum(1)).mean()

  def run():
    (tokens, old), (other, _) = sample(prompts), sample_mixture(prompts)
    with torch.no_grad():
      preference = torch.sigmoid(scores_of(tokens) - scores_of(other))
      ref = reference_of(tokens)
    program.update(loss_of(tokens, ref, preference))
    return {"generated": 2 * count(old), "updates": 1}

  return run


WORKS = {f.__name__: f for f in (sft, reward_model, dpo, generate, hf, ppo, grpo, nash_md)}


def main():
  peer = protocol.Peer()
  torch.set_num_threads(peer.spec["cores"])
  torch.manual_seed(0)
  work, _, how = peer.work.partition(":")
  program = Program(peer.spec, how == "compiled")
  run = WORKS[how if how == "hf" else work](program)
  peer.serve(run, lambda: facts(program))


def facts(program):
  """Numbers that other programs with the same weights and tokens have too."""
  policy = load(program.spec, "policy")
  with torch.no_grad():
    nll = -token_logprobs(policy, program.tokens[:, 0], 1).mean().item()
  return {"params": sum(p.numel() for p in policy.parameters()), "nll": nll}


if __name__ == "__main__":
  main()
