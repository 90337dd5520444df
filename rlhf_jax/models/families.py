"""Tables of the fields of config.json and the names of tensors in each model family.

The default of an absent field is the one of the family's configuration class in transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Head = Literal["language", "scalar"]

REQUIRED = object()


class Field(NamedTuple):
  """A field of config.json.

  Attributes:
    ours: Fields of ModelConfig that it sets.
    kind: Type of the value.
    default: Value if the field is absent. None for `kv_heads`, `head_dim` and `mlp_width` derives
      the value from other fields.
  """

  ours: tuple[str, ...]
  kind: type
  default: Any = REQUIRED


class Family(NamedTuple):
  """One architecture.

  Attributes:
    model_type: Name of the family in config.json.
    architectures: Classes of transformers that hold the weights -> their head.
    fields: Fields of config.json that set fields of ModelConfig.
    fixed: Fields of ModelConfig that are part of the architecture.
    activation: Field that names the activation, and the value that is implemented.
    modules: Our modules -> theirs; `{}` is the index of the layer, a second one that of the expert.
      Modules of one name are stored in one tensor, side by side in this order.
    only: Fields that change the computation -> the values that are implemented.
    ignored: Fields that change nothing, in addition to those of all families.
    aliases: Other names of fields -> the names above.
    parsed: Fields of windows and rope that are read in addition to `fields` and the usual ones.
    window: Default of `sliding_window`.
    is_local: `(layer, window, raw) -> bool`, True if a layer has the window, for folders without
      `layer_types`. None if no layer has one.
    rope: "one" base for all layers, "by_layer" for another base in layers with a window, or "none".
    rope_theta: Default base, and default base in layers with a window.
    rope_kinds: Implemented kinds of rope scaling.
    partial_rotary: True if `partial_rotary_factor` is read.
    transposed: True if linear layers are [out, in].
    prefix: Prefix of tensor names that some folders omit.
  """

  model_type: str
  architectures: Mapping[str, Head]
  fields: Mapping[str, Field]
  fixed: Mapping[str, Any]
  activation: tuple[str, str]
  modules: Mapping[str, str]
  only: Mapping[str, tuple[Any, ...]] = {}
  ignored: frozenset[str] = frozenset()
  aliases: Mapping[str, str] = {}
  parsed: frozenset[str] = frozenset()
  window: int | None = None
  is_local: Callable[[int, int | None, Mapping[str, Any]], bool] | None = None
  rope: Literal["one", "by_layer", "none"] = "one"
  rope_theta: tuple[float, float] = (10000.0, 10000.0)
  rope_kinds: tuple[str, ...] = ("default", "linear", "llama3")
  partial_rotary: bool = False
  transposed: bool = True
  prefix: str = ""


def _fields(
  *,
  max_length: int,
  kv_heads: int | None = None,
  head_dim: int | None = None,
  norm_eps: float = 1e-6,
  tied: bool = False,
) -> dict[str, Field]:
  return {
    "vocab_size": Field(("vocab_size",), int),
    "hidden_size": Field(("width",), int),
    "num_hidden_layers": Field(("layers",), int),
    "num_attention_heads": Field(("heads",), int),
    "num_key_value_heads": Field(("kv_heads",), int, kv_heads),
    "head_dim": Field(("head_dim",), int, head_dim),
    "intermediate_size": Field(("mlp_width",), int),
    "max_position_embeddings": Field(("max_length",), int, max_length),
    "rms_norm_eps": Field(("norm_eps",), float, norm_eps),
    "tie_word_embeddings": Field(("tied",), bool, tied),
    "initializer_range": Field(("init_std",), float, 0.02),
  }


_ATTENTION_BIAS = {"attention_bias": Field(("qkv_bias", "out_bias"), bool, False)}

_LAYER = "model.layers.{}."
_MODULES = {
  "embed/embedding": "model.embed_tokens",
  "final_norm": "model.norm",
  "layers/attention_norm": _LAYER + "input_layernorm",
  "layers/mlp_norm": _LAYER + "post_attention_layernorm",
  "layers/attention/q": _LAYER + "self_attn.q_proj",
  "layers/attention/k": _LAYER + "self_attn.k_proj",
  "layers/attention/v": _LAYER + "self_attn.v_proj",
  "layers/attention/o": _LAYER + "self_attn.o_proj",
  "layers/mlp/gate": _LAYER + "mlp.gate_proj",
  "layers/mlp/up": _LAYER + "mlp.up_proj",
  "layers/mlp/down": _LAYER + "mlp.down_proj",
  "score": "score",
  "lm_head": "lm_head",
}
_EXPERTS = _LAYER + "mlp.experts.{}."
_QWEN_EXPERTS = {
  "layers/mlp/router": _LAYER + "mlp.gate",
  "layers/mlp/experts/gate": _EXPERTS + "gate_proj",
  "layers/mlp/experts/up": _EXPERTS + "up_proj",
  "layers/mlp/experts/down": _EXPERTS + "down_proj",
}
_MIXTRAL_EXPERTS = _LAYER + "block_sparse_moe.experts.{}."
# Fields of the losses that balance experts in pretraining; no loss here adds them.
_ROUTER_LOSS = frozenset({"output_router_logits", "router_aux_loss_coef"})
_QK_NORM = {
  "layers/attention/q_norm": _LAYER + "self_attn.q_norm",
  "layers/attention/k_norm": _LAYER + "self_attn.k_norm",
}
_POST_NORMS = {
  "layers/attention_post_norm": _LAYER + "post_attention_layernorm",
  "layers/mlp_norm": _LAYER + "pre_feedforward_layernorm",
  "layers/mlp_post_norm": _LAYER + "post_feedforward_layernorm",
}
_GPT2_LAYER = "transformer.h.{}."

_QWEN_WINDOWS: dict[str, Any] = {
  "parsed": frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
  "window": 4096,
  "is_local": lambda layer, window, raw: (
    window is not None and layer >= raw.get("max_window_layers", 28)
  ),
}
_GEMMA: dict[str, Any] = {
  "activation": ("hidden_activation", "gelu_pytorch_tanh"),
  # An older name of the same field that transformers does not read.
  "only": {"hidden_act": ("gelu_pytorch_tanh", None)},
  "ignored": frozenset({"cache_implementation", "_sliding_window_pattern"}),
  "window": 4096,
}
_GEMMA_FIXED = {
  "norm": "rms_plus_one",
  "post_norms": True,
  "activation": "gelu_tanh",
  "embed_scale": True,
}
_QUERY_WIDTH = {"query_pre_attn_scalar": Field(("query_width",), int, 256)}

FAMILIES: Mapping[str, Family] = {
  "llama": Family(
    model_type="llama",
    architectures={
      "LlamaForCausalLM": "language",
      "LlamaForSequenceClassification": "scalar",
    },
    fields=_fields(max_length=2048)
    | _ATTENTION_BIAS
    | {"mlp_bias": Field(("mlp_bias",), bool, False)},
    fixed={},
    activation=("hidden_act", "silu"),
    modules=_MODULES,
  ),
  "qwen2": Family(
    model_type="qwen2",
    architectures={
      "Qwen2ForCausalLM": "language",
      "Qwen2ForSequenceClassification": "scalar",
    },
    fields=_fields(max_length=32768, kv_heads=32),
    fixed={"qkv_bias": True},
    activation=("hidden_act", "silu"),
    modules=_MODULES,
    **_QWEN_WINDOWS,
  ),
  "qwen3": Family(
    model_type="qwen3",
    architectures={
      "Qwen3ForCausalLM": "language",
      "Qwen3ForSequenceClassification": "scalar",
    },
    fields=_fields(max_length=32768, kv_heads=32, head_dim=128) | _ATTENTION_BIAS,
    fixed={"qk_norm": True},
    activation=("hidden_act", "silu"),
    modules=_MODULES | _QK_NORM,
    **_QWEN_WINDOWS,
  ),
  "mistral": Family(
    model_type="mistral",
    architectures={
      "MistralForCausalLM": "language",
      "MistralForSequenceClassification": "scalar",
    },
    fields=_fields(max_length=131072, kv_heads=8),
    fixed={},
    activation=("hidden_act", "silu"),
    modules=_MODULES,
    parsed=frozenset({"sliding_window"}),
    window=4096,
    is_local=lambda layer, window, raw: window is not None,
  ),
  "mixtral": Family(
    model_type="mixtral",
    architectures={
      "MixtralForCausalLM": "language",
      "MixtralForSequenceClassification": "scalar",
    },
    fields=_fields(max_length=131072, kv_heads=8, norm_eps=1e-5)
    | {
      "num_local_experts": Field(("experts",), int, 8),
      "num_experts_per_tok": Field(("experts_per_token",), int, 2),
    },
    fixed={},
    activation=("hidden_act", "silu"),
    modules=_MODULES
    | {
      "layers/mlp/router": _LAYER + "block_sparse_moe.gate",
      "layers/mlp/experts/gate": _MIXTRAL_EXPERTS + "w1",
      "layers/mlp/experts/up": _MIXTRAL_EXPERTS + "w3",
      "layers/mlp/experts/down": _MIXTRAL_EXPERTS + "w2",
    },
    only={"router_jitter_noise": (0.0, None)},
    ignored=_ROUTER_LOSS,
    parsed=frozenset({"sliding_window"}),
    is_local=lambda layer, window, raw: window is not None,
    rope_theta=(1e6, 10000.0),
  ),
  "qwen3_moe": Family(
    model_type="qwen3_moe",
    architectures={
      "Qwen3MoeForCausalLM": "language",
      "Qwen3MoeForSequenceClassification": "scalar",
    },
    fields={
      name: field
      for name, field in _fields(max_length=32768, kv_heads=4).items()
      if name != "intermediate_size"  # For layers without experts; there are none.
    }
    | _ATTENTION_BIAS
    | {
      "moe_intermediate_size": Field(("mlp_width",), int, 768),
      "num_experts": Field(("experts",), int, 128),
      "num_experts_per_tok": Field(("experts_per_token",), int, 8),
      "norm_topk_prob": Field(("normalized_router",), bool, False),
    },
    fixed={"qk_norm": True},
    activation=("hidden_act", "silu"),
    modules=_MODULES | _QK_NORM | _QWEN_EXPERTS,
    only={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ignored=_ROUTER_LOSS | {"intermediate_size", "max_window_layers"},
    aliases={"num_local_experts": "num_experts"},
    parsed=frozenset({"use_sliding_window", "sliding_window"}),
    window=4096,
    is_local=lambda layer, window, raw: window is not None,
  ),
  "gemma2": Family(
    model_type="gemma2",
    architectures={
      "Gemma2ForCausalLM": "language",
      "Gemma2ForSequenceClassification": "scalar",
    },
    fields=_fields(max_length=8192, kv_heads=4, head_dim=256, tied=True)
    | _ATTENTION_BIAS
    | _QUERY_WIDTH
    | {
      "attn_logit_softcapping": Field(("attention_softcap",), float, 50.0),
      "final_logit_softcapping": Field(("logit_softcap",), float, 30.0),
    },
    fixed=_GEMMA_FIXED,
    modules=_MODULES | _POST_NORMS,
    parsed=frozenset({"sliding_window", "layer_types"}),
    is_local=lambda layer, window, raw: layer % 2 == 0,
    **_GEMMA,
  ),
  "gemma3": Family(
    model_type="gemma3_text",
    architectures={
      "Gemma3ForCausalLM": "language",
      "Gemma3TextForSequenceClassification": "scalar",
    },
    # The format has a cap on attention scores, but transformers does not apply it.
    fields=_fields(max_length=131072, kv_heads=4, head_dim=256, tied=True)
    | _ATTENTION_BIAS
    | _QUERY_WIDTH
    | {"final_logit_softcapping": Field(("logit_softcap",), float, None)},
    fixed=_GEMMA_FIXED | {"qk_norm": True},
    modules=_MODULES | _POST_NORMS | _QK_NORM,
    parsed=frozenset(
      {"sliding_window", "layer_types", "sliding_window_pattern", "rope_local_base_freq"}
    ),
    is_local=lambda layer, window, raw: (layer + 1) % raw.get("sliding_window_pattern", 6) > 0,
    rope="by_layer",
    rope_theta=(1e6, 10000.0),
    **_GEMMA,
  ),
  "gpt2": Family(
    model_type="gpt2",
    architectures={
      "GPT2LMHeadModel": "language",
      "GPT2ForSequenceClassification": "scalar",
    },
    fields={
      "vocab_size": Field(("vocab_size",), int),
      "n_embd": Field(("width",), int),
      "n_layer": Field(("layers",), int),
      "n_head": Field(("heads",), int),
      "n_inner": Field(("mlp_width",), int, None),
      "n_positions": Field(("max_length",), int, 1024),
      "layer_norm_epsilon": Field(("norm_eps",), float, 1e-5),
      "tie_word_embeddings": Field(("tied",), bool, True),
      "initializer_range": Field(("init_std",), float, 0.02),
    },
    fixed={
      "norm": "layer",
      "activation": "gelu_tanh",
      "gated_mlp": False,
      "positions": "learned",
      "qkv_bias": True,
      "out_bias": True,
      "mlp_bias": True,
    },
    activation=("activation_function", "gelu_new"),
    modules={
      "embed/embedding": "transformer.wte",
      "embed/positions": "transformer.wpe",
      "final_norm": "transformer.ln_f",
      "layers/attention_norm": _GPT2_LAYER + "ln_1",
      "layers/mlp_norm": _GPT2_LAYER + "ln_2",
      "layers/attention/q": _GPT2_LAYER + "attn.c_attn",
      "layers/attention/k": _GPT2_LAYER + "attn.c_attn",
      "layers/attention/v": _GPT2_LAYER + "attn.c_attn",
      "layers/attention/o": _GPT2_LAYER + "attn.c_proj",
      "layers/mlp/up": _GPT2_LAYER + "mlp.c_fc",
      "layers/mlp/down": _GPT2_LAYER + "mlp.c_proj",
      "score": "score",
      "lm_head": "lm_head",
    },
    only={
      "scale_attn_weights": (True,),
      "scale_attn_by_inverse_layer_idx": (False,),
      # Other names of the fields above, which transformers would prefer.
      "hidden_size": (None,),
      "num_hidden_layers": (None,),
      "num_attention_heads": (None,),
      "max_position_embeddings": (None,),
    },
    ignored=frozenset(
      {
        "attn_pdrop",
        "embd_pdrop",
        "n_ctx",
        "reorder_and_upcast_attn",  # Scores are float32 here in any case.
        "resid_pdrop",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
      }
    ),
    rope="none",
    transposed=False,
    prefix="transformer.",
  ),
  "phi3": Family(
    model_type="phi3",
    architectures={
      "Phi3ForCausalLM": "language",
      "Phi3ForSequenceClassification": "scalar",
    },
    fields=_fields(max_length=4096, norm_eps=1e-5),
    fixed={},
    activation=("hidden_act", "silu"),
    modules=_MODULES
    | {f"layers/attention/{name}": _LAYER + "self_attn.qkv_proj" for name in "qkv"}
    | {f"layers/mlp/{name}": _LAYER + "mlp.gate_up_proj" for name in ("gate", "up")},
    # The context length before longrope extended it.
    ignored=frozenset({"embd_pdrop", "resid_pdrop", "original_max_position_embeddings"}),
    parsed=frozenset({"sliding_window"}),
    is_local=lambda layer, window, raw: window is not None,
    rope_kinds=("default",),
    partial_rotary=True,
  ),
}
