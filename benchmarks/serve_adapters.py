"""Adapters that each answer with a word of their own, which is their name.

  python -m benchmarks.serve_adapters --model=BASE --out=words --adapters=200

VeRA's, on one pair; some at a time are trained together, on the same prompts.
With them a test of a server knows by an answer which adapter gave it
(`benchmarks/serve_load.py`). One that did not learn its word is an error.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks.serve_words import PROMPTS, words
from configs import language
from experiments import cli
from vera_jax.adapters.files import save_adapter
from vera_jax.adapters.labels import join
from vera_jax.adapters.methods import settings_in
from vera_jax.adapters.projections import PRNG
from vera_jax.data.completions import Completions, prompt_ids
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError
from vera_jax.models.decoder import logits
from vera_jax.models.folder import resolve
from vera_jax.models.hf_weights import fingerprint, read_model
from vera_jax.models.kinds import KINDS, WORDS
from vera_jax.pretrained.blueprint import blueprint, load_model
from vera_jax.pretrained.sharding import make_mesh

MODEL = flags.DEFINE_string("model", None, "The base, a decoder.")
OUT = flags.DEFINE_string("out", None, "The folder of the adapters.")
ADAPTERS = flags.DEFINE_integer("adapters", 200, "How many.", 1, 3000)
RANK = flags.DEFINE_integer("rank", 64, "Of all.", 1)
AT_ONCE = flags.DEFINE_integer("at_once", 20, "Trained together.", 1)
STEPS = flags.DEFINE_integer("steps", 150, "Updates of each.", 1)
RATE = flags.DEFINE_float("rate", 0.05, "Of Adam.")


def main() -> None:
  if not (MODEL.value and OUT.value):
    raise UserError("Give --model=BASE and --out=FOLDER.")
  folder = resolve(MODEL.value)
  config = language.get_config()
  config.vera.rank = RANK.value
  settings = settings_in(config, "vera")
  plan = blueprint(
    read_model(folder),
    outputs=1,
    head=KINDS[WORDS].head,
    method="vera",
    settings=settings,
    plan="factored",
  )
  model = load_model(plan, folder, mesh=make_mesh(data=1), seed=0)
  about = {
    "task": "language",
    "method": "vera",
    "settings": settings,
    "base": MODEL.value,
    "base_fingerprint": fingerprint(folder),
    "labels": [],
    "kind": WORDS,
    "projection_prng": PRNG,
    "projection_digest": model.digest,
    "max_length": None,
  }
  tx = optax.adam(RATE.value)

  def losses(trainable: Any, tokens: Any, learned: Any) -> Any:
    """The mean loss of an adapter's words, and whether it has learned all."""
    params = join(trainable, model.frozen)
    variables = {"params": params, "projections": model.projections}
    scores = logits(plan.module.apply(variables, tokens))[:, :-1]
    each = optax.softmax_cross_entropy_with_integer_labels(
      scores, tokens[:, 1:]
    )
    right = (scores.argmax(-1) == tokens[:, 1:]) | ~learned[:, 1:]
    return jnp.mean(each, where=learned[:, 1:]), right.all()

  @jax.jit
  def train(tokens: Any, learned: Any) -> Any:
    count = len(tokens)
    start = jax.tree.map(
      lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)),
      model.trainable,
    )

    def step(carry: Any, _: Any) -> Any:
      params, state = carry
      slope = jax.vmap(jax.grad(losses, has_aux=True))
      updates, state = tx.update(slope(params, tokens, learned)[0], state)
      return (optax.apply_updates(params, updates), state), None

    first = start, tx.init(start)
    (params, _), _ = jax.lax.scan(step, first, length=STEPS.value)
    return params, jax.vmap(losses)(params, tokens, learned)[1]

  tokens, learned = examples(folder, words(ADAPTERS.value))
  for begin in range(0, len(tokens), AT_ONCE.value):
    few = slice(begin, begin + AT_ONCE.value)
    params, right = train(tokens[few], learned[few])
    for i, name in enumerate(words(ADAPTERS.value)[few]):
      if not right[i]:
        raise UserError(f"{name} was not learned: give more --steps.")
      trained = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params)
      save_adapter(Path(OUT.value) / name, trained, about=about)
    print(f"{begin + len(right)} adapters", flush=True)


def examples(folder: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """Tokens, and which of them are learned, [adapters, prompts, length]."""
  tokenizer = load_tokenizer(folder)
  end = int(tokenizer.eos_token_id)
  prompts = prompt_ids(tokenizer, list(PROMPTS), how=Completions("left"))
  said = tokenizer([f" {name}" for name in names], add_special_tokens=False)
  answers = [[*ids, end] for ids in said["input_ids"]]
  width = max(map(len, prompts)) + max(map(len, answers))
  tokens = np.full((len(names), len(prompts), width), end, np.int32)
  learned = np.zeros(tokens.shape, bool)
  for i, answer in enumerate(answers):
    for j, prompt in enumerate(prompts):
      until = len(prompt) + len(answer)
      tokens[i, j, :until] = [*prompt, *answer]
      learned[i, j, len(prompt) : until] = True
  return tokens, learned


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
