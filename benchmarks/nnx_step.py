"""What VeRA costs in tunix, against qwix's LoRA: a step, a rollout, a file.

  python -m benchmarks.nnx_step
  python -m benchmarks.nnx_step --size=tiny --rounds=2      a quick try of it

On random weights of SmolLM2-135M's shapes in tunix's Llama, in float32, q and v
adapted: VeRA at r = 256, the pair held or made at each call, and LoRA at r = 8.

- The seconds of a step of PeftTrainer, 4 texts of 64 tokens.
- The seconds of a rollout, 24 tokens for each of 4 prompts, from the bare base
  and from merged weights; and those of the merge, once after each update.
- The bytes that tunix's checkpoint manager writes for a step: the trained
  leaves and Adam's two moments of them.

The variants take turns, and a ratio is one of neighbours in a round; their
median and range are shown. Needs requirements-tunix.txt; 4 GB of memory.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

import vera_jax.nnx
from benchmarks.report import environment, interleaved, load, load_line, write
from experiments import cli
from experiments.markdown import markdown_table
from vera_jax.errors import UserError
from vera_jax.files import write_text

SIZES: dict[str, dict[str, Any]] = {
  "smollm2": {
    "num_layers": 30,
    "vocab_size": 49_152,
    "embed_dim": 576,
    "hidden_dim": 1_536,
    "num_heads": 9,
    "num_kv_heads": 3,
  },
  "llama3_8b": {  # for --parts=bytes alone, where no base is made
    "num_layers": 32,
    "vocab_size": 128_256,
    "embed_dim": 4_096,
    "hidden_dim": 14_336,
    "num_heads": 32,
    "num_kv_heads": 8,
  },
  "tiny": {
    "num_layers": 2,
    "vocab_size": 256,
    "embed_dim": 48,
    "hidden_dim": 64,
    "num_heads": 3,
    "num_kv_heads": 1,
  },
}
TARGETS = ("q_proj", "v_proj")
RANK, LORA_RANK = 256, 8
ROWS, LENGTH = 4, 64  # of a step
PROMPT, DRAWN = 8, 24  # tokens of a rollout's texts
LORA, HELD, MADE = "LoRA, r = 8", "VeRA, pair held", "VeRA, pair made"
BASE, MERGED = "bare base", "merged"


class Numbers:
  """A tokenizer for tunix: a text is numbers."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, tokens: list[int]) -> str:
    return " ".join(map(str, tokens))

  def pad_id(self) -> int:
    return 0

  def bos_id(self) -> int:
    return 0  # tunix puts none before a text then

  def eos_id(self) -> int:
    return -1  # is never drawn


def define_flags() -> None:
  flags.DEFINE_enum("size", "smollm2", list(SIZES), "The model's shapes.")
  flags.DEFINE_integer("rounds", 7, "Turns of each variant.", lower_bound=1)
  flags.DEFINE_multi_enum(
    "parts",
    ["bytes", "rollout", "step"],
    ["bytes", "rollout", "step"],
    "What is measured.",
  )
  flags.DEFINE_string("out", "results/benchmarks", "Where nnx_step.* goes.")


def main() -> None:
  try:
    import qwix  # noqa: F401
    import tunix  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"The comparison needs {error.name}, which is not installed:"
      " pip install -r requirements-tunix.txt"
    ) from error
  options = flags.FLAGS
  result = environment("nnx_step") | {
    "size": options.size,
    "rounds": options.rounds,
  }
  measures: dict[str, Callable[[], dict[str, Any]]] = {
    "step": partial(steps, options.size, options.rounds),
    "rollout": partial(rollouts, options.size, options.rounds),
    "bytes": partial(saved_bytes, options.size),
  }
  for part, measure in measures.items():
    if part in options.parts:
      result[part] = measure()
  result["load_after"] = load()
  path = write("nnx_step", result, folder=options.out)
  page = markdown(result)
  write_text(path.with_suffix(".md"), page)
  print(f"{page}\n{path}")


def llama(size: str) -> Any:
  """tunix's Llama of random weights."""
  from tunix.models.llama3.model import Llama3, ModelConfig

  config = ModelConfig(
    **SIZES[size],
    head_dim=SIZES[size]["embed_dim"] // SIZES[size]["num_heads"],
    norm_eps=1e-5,
    rope_theta=1_000_000,
    weight_tying=True,
  )
  model = Llama3(config, rngs=nnx.Rngs(0))
  key = jax.random.key(1)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, nnx.Linear):  # tunix's own are zero
      shape = module.kernel.shape
      kernel = jax.random.normal(key, shape) / np.sqrt(shape[0])
      module.kernel.set_value(kernel)
  return model


def adapted(variant: str, base: Any) -> Any:
  """A copy with an adapter, which shares the base's arrays."""
  import qwix

  model = nnx.clone(base)  # other variables, the same arrays
  if variant == LORA:
    pattern = "|".join(f".*{name}" for name in TARGETS)
    provider = qwix.LoraProvider(
      module_path=pattern, rank=LORA_RANK, alpha=2 * LORA_RANK
    )
    example = {name: x for name, x in inputs(1, 8).items() if name != "tokens"}
    return qwix.apply_lora_to_model(
      model,
      provider,
      jnp.ones((1, 8), int),
      cache=None,
      **example,
      rngs=nnx.Rngs(0),
    )
  return vera_jax.nnx.adapt(
    model,
    vera_jax.vera(rank=RANK),
    targets=TARGETS,
    projections="held" if variant == HELD else "made",
  )


def inputs(rows: int, length: int) -> dict[str, jax.Array]:
  """What tunix's Llama wants beside the tokens."""
  causal = jnp.tril(jnp.ones((length, length), bool))
  return {
    "positions": jnp.tile(jnp.arange(length), (rows, 1)),
    "attention_mask": jnp.tile(causal, (rows, 1, 1)),
  }


def steps(size: str, rounds: int) -> dict[str, Any]:
  """Seconds of a step of tunix's trainer."""
  from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

  base = llama(size)
  tokens = np.random.default_rng(0).integers(
    1, SIZES[size]["vocab_size"], (ROWS, LENGTH)
  )
  batch = TrainingInput(tokens, np.ones_like(tokens, bool))

  def runner(variant: str) -> Callable[[], Any]:
    trainer = PeftTrainer(
      adapted(variant, base),
      optax.adam(1e-3),
      TrainingConfig(eval_every_n_steps=1, max_steps=1),
    )
    trainer.with_gen_model_input_fn(lambda x: vars(x) | inputs(ROWS, LENGTH))
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    run = lambda: jax.block_until_ready(step(batch)[0])  # noqa: E731
    run()  # is compiled
    return run

  return compared(LORA, {x: runner(x) for x in (LORA, HELD, MADE)}, rounds)


def rollouts(size: str, rounds: int) -> dict[str, Any]:
  """Seconds of drawing texts, and of the merge before it."""
  from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
  from tunix.rl.rollout.vanilla_rollout import VanillaRollout

  from vera_jax.nnx.tunix import MergedRollout

  config = RolloutConfig(
    max_prompt_length=PROMPT,
    max_tokens_to_generate=DRAWN,
    kv_cache_size=PROMPT + DRAWN,
    temperature=1.0,
  )
  base = llama(size)
  rng = np.random.default_rng(0)
  rows = rng.integers(1, SIZES[size]["vocab_size"], (ROWS, PROMPT))
  prompts = [" ".join(map(str, row)) for row in rows]
  plain = VanillaRollout(
    base,
    Numbers(),
    CacheConfig(
      cache_size=config.kv_cache_size,
      num_layers=base.config.num_layers,
      num_kv_heads=base.config.num_kv_heads,
      head_dim=base.config.head_dim,
    ),
  )
  actor = adapted(MADE, base)
  merged = MergedRollout(actor, Numbers(), None, config)

  def train_and_merge() -> float:
    move(actor)
    sent = nnx.state(actor, nnx.LoRAParam)
    start = time.perf_counter()
    merged.update_params(sent, (nnx.LoRAParam,))
    jax.block_until_ready(merged._sampler.transformer_state)
    return time.perf_counter() - start

  train_and_merge()  # is compiled
  merges = [train_and_merge() for _ in range(rounds)]
  variants = {
    BASE: partial(plain.generate, prompts, config),
    MERGED: partial(merged.generate, prompts, config),
  }
  for run in variants.values():
    run()
  return compared(BASE, variants, rounds) | {"seconds_of_merge": merges}


def move(model: Any) -> None:
  """Other values in the trained leaves, none of them zero."""
  state = nnx.state(model, nnx.LoRAParam)
  keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(state))))
  moved = jax.tree.map(
    lambda x: x + 0.01 * jax.random.normal(next(keys), x.shape, x.dtype), state
  )
  nnx.update(model, moved)


def saved_bytes(size: str) -> dict[str, Any]:
  """Bytes of a step's folder, and those of the arrays in it.

  The values are after an update by gradients without zeros. The base is not
  saved, and so not made.
  """
  from tunix.sft.checkpoint_manager import CheckpointManager

  on_disk, of_arrays = {}, {}
  for variant in (LORA, HELD, MADE):
    model = nnx.eval_shape(partial(_adapted_anew, variant, size))
    leaves = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape), nnx.state(model, nnx.LoRAParam)
    )
    nnx.update(model, leaves)
    optimiser = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
    move(model)
    optimiser.update(model, nnx.state(model, nnx.LoRAParam))
    of_arrays[variant] = 3 * sum(x.nbytes for x in jax.tree.leaves(leaves))
    with tempfile.TemporaryDirectory() as folder:
      manager = CheckpointManager(folder)
      manager.save(1, model, optimiser, save_only_lora_params=True, force=True)
      manager.close()
      on_disk[variant] = sum(
        (Path(place) / name).stat().st_size
        for place, _, names in os.walk(Path(folder) / "1")
        for name in names
      )
  return {"a saved step": on_disk, "its arrays alone": of_arrays}


def _adapted_anew(variant: str, size: str) -> Any:
  return adapted(variant, llama(size))


def compared(
  against: str, variants: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, Any]:
  """Seconds of each round, and each round's ratio to one of the variants."""
  seconds = interleaved(variants, repetitions=rounds)
  ratios = {
    name: [a / b for a, b in zip(times, seconds[against], strict=True)]
    for name, times in seconds.items()
  }
  return {"seconds": seconds, "ratios": ratios}


def spread(values: list[float], form: str) -> str:
  """Median, and least to most."""
  low, middle, high = (
    format(x, form)
    for x in (min(values), statistics.median(values), max(values))
  )
  return f"{middle} ({low} to {high})"


def markdown(result: dict[str, Any]) -> str:
  """The page of a result."""
  rows = []
  for part, what in (("step", "a step"), ("rollout", "a rollout")):
    for name, seconds in result.get(part, {}).get("seconds", {}).items():
      ratios = result[part]["ratios"][name]
      rows.append(
        (what, name, f"{spread(seconds, '.3f')} s", spread(ratios, ".3f"))
      )
  if "rollout" in result:
    merges = result["rollout"]["seconds_of_merge"]
    rows.append(("the merge", "VeRA", f"{spread(merges, '.3f')} s", ""))
  for what, counts in result.get("bytes", {}).items():
    for name, count in counts.items():
      ratio = f"{count / counts[LORA]:.3f}"
      rows.append((what, name, f"{count:,} bytes", ratio))
  table = markdown_table(("what", "of", "median (range)", "ratio"), rows)
  versions = result["versions"]
  return "\n".join(
    (
      f"`{result['command']}`: {result['size']}, {result['rounds']} rounds.",
      "",
      table,
      "",
      f"- {result['cpu']}, {result['cores']} cores; jax {versions['jax']}",
      load_line(result),
      "",
    )
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, usage=__doc__)
