"""Validated, fixed-shape, resumable batches from JSON Lines, TFDS or the built-in task."""

from rlhf_jax.data.datasets import Batch as Batch
from rlhf_jax.data.datasets import DataConfig as DataConfig
from rlhf_jax.data.datasets import Dataset as Dataset
from rlhf_jax.data.datasets import PromptBatch as PromptBatch
from rlhf_jax.data.datasets import batches as batches
from rlhf_jax.data.datasets import comparison_kind as comparison_kind
from rlhf_jax.data.datasets import eval_batches as eval_batches
from rlhf_jax.data.datasets import from_examples as from_examples
from rlhf_jax.data.datasets import from_rows as from_rows
from rlhf_jax.data.datasets import load as load
from rlhf_jax.data.datasets import padding_fraction as padding_fraction
from rlhf_jax.data.datasets import prompts_from_texts as prompts_from_texts
from rlhf_jax.data.datasets import responses_of as responses_of
from rlhf_jax.data.schema import Example as Example
from rlhf_jax.data.schema import Kind as Kind
from rlhf_jax.data.schema import parse_row as parse_row
from rlhf_jax.data.sources import DataError as DataError
from rlhf_jax.data.sources import Row as Row
from rlhf_jax.data.sources import read_jsonl as read_jsonl
from rlhf_jax.data.sources import read_tfds as read_tfds
from rlhf_jax.data.tokenizer import Messages as Messages
from rlhf_jax.data.tokenizer import Tokenizer as Tokenizer
from rlhf_jax.data.tokenizer import load_tokenizer as load_tokenizer
from rlhf_jax.data.tokenizer import transcript as transcript
from rlhf_jax.data.tokenizer import word_level_tokenizer as word_level_tokenizer
