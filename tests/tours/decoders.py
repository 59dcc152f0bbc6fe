"""Round trips of decoders' adapters, with the texts that they write.

A tiny random Llama and a tiny random GPT-2 learn a few lines by VeRA, in a real
run of `experiments.language`'s config. GPT-2's query and value are parts of its
fused `c_attn`, so that its adapter goes to PEFT as one of twice the rank.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import language
from tests.models.gguf_folders import random_folder
from tests.tours import reference
from tests.tours.measures import (
  MOVED,
  NAMES,
  ROUND,
  SAME,
  files_size,
  largest,
  trained_and_saved,
)
from tests.tours.page import Step, Texts
from vera_jax.adapters.files import load_adapter, save_adapter
from vera_jax.adapters.labels import label_tree, split
from vera_jax.export.gguf import write_gguf_of
from vera_jax.export.hf import write_merged
from vera_jax.generate.generator import Generator
from vera_jax.models.decoder import logits
from vera_jax.models.gguf_folder import gguf_folder
from vera_jax.peft_io import export_adapter, import_adapter
from vera_jax.peft_io.forms import HELD_BY
from vera_jax.peft_io.gguf import export_gguf_adapter, import_gguf_adapter
from vera_jax.pretrained.classifier import (
  Classifier,
  load_classifier,
  restore_adapter,
)
from vera_jax.train.loop import train_and_evaluate

ROWS = 39  # of the embedding: as many as the tokenizer has words, no more
DECODERS = {"llama": "Llama", "gpt2": "GPT-2"}
LINES = [
  f"{start} {verb} {end}"
  for start in ("the river", "12 rivers", "low river", "the run")
  for verb in ("runs", "don't run", "low runs")
  for end in ("low", "12 low", "in the river")
]
PROMPTS = ["the", "the river", "12", "low river don't", "run", "the run low"]
NEW = 12  # tokens of a text
IDS = np.random.default_rng(0).integers(0, ROWS, (6, 16)).astype(np.int32)
# Of a logit, by format. A weight is rounded by at most 2^-11 of itself in F16,
# 2^-9 in BF16, and in Q8_0 by 1/254 of the largest of its 32: some twenty times
# as much as in F16.
BOUNDS = {"gguf-f16": 5e-2, "gguf-bf16": 0.2, "gguf-q8_0": 1.0}
LLAMA_CPP = {"llama": ROUND, "gpt2": 2e-3}  # its GELU is a table of float16


class Answers(NamedTuple):
  """What a decoder says: logits of the rows in IDS, texts behind PROMPTS."""

  logits: np.ndarray
  texts: list[str]


def decoder_trips(
  folder: Path, kind: str, *, with_torch: bool = True
) -> Iterator[Step]:
  """All steps of one decoder, in order.

  Args:
    folder: empty at the start.
    kind: a name in `DECODERS`.
    with_torch: whether transformers and PEFT take part; else PEFT's folders
      are written and read, but not by PEFT.
  """
  base = random_folder(folder / "base", kind, rows=ROWS)
  config, run = _config(folder, base), folder / "run"
  result = train_and_evaluate(config, run)
  adapter = run / "adapter"
  _, _, step = trained_and_saved(config, run, step=result["best"]["step"])
  yield step
  # "factored": A and B apart from the weights, not added to them beforehand
  adapted = restore_adapter(load_adapter(adapter), plan="factored")
  bare, before = _ours(load_classifier(base)), _ours(adapted)
  yield _compare(
    "training moved the logits",
    "base, adapter",
    bare,
    before,
    MOVED,
    moved=True,
  )
  trained = split(adapted.params, label_tree(adapted.params, adapted.adapter))
  save_adapter(folder / "again", trained[0], about=adapted.about)
  again = restore_adapter(load_adapter(folder / "again"), plan="factored")
  yield _compare(
    "adapter folder → saved, loaded, texts with the adapter unmerged",
    "adapter, adapter",
    before,
    _ours(again, keep_adapter=True),
    SAME,
    written=files_size(folder / "again"),
  )

  merged = folder / "merged"
  write_merged(adapted, merged)
  yield _compare(
    "adapter folder → merge",
    "adapter, merged folder",
    before,
    _ours(load_classifier(merged)),
    ROUND,
    written=files_size(merged),
  )
  if with_torch:
    yield _compare(
      "merge → torch loads it",
      "adapter, torch",
      before,
      _theirs(*reference.decoder(merged)),
      ROUND,
    )

  for method in HELD_BY["vera"]:
    name = NAMES[method]
    theirs, ours = folder / f"{method}-peft", folder / f"{method}-back"
    export_adapter(adapter, theirs, method=method)
    if with_torch:
      model, tokenizer = reference.decoder(base)
      model = reference.with_adapter(model, theirs)
      yield _compare(
        f"adapter folder → PEFT export as {name} → PEFT loads it",
        "adapter, PEFT",
        before,
        _theirs(model, tokenizer),
        ROUND,
        written=files_size(theirs),
      )
      theirs = folder / f"{method}-peft-again"
      model.save_pretrained(str(theirs))
    import_adapter(theirs, ours)
    source = "PEFT's" if with_torch else "the exported"
    yield _compare(
      f"{source} {name} → import",
      "adapter, imported adapter",
      before,
      _ours(restore_adapter(load_adapter(ours))),
      ROUND,
      written=files_size(ours),
    )

  beside = folder / "adapter.gguf"
  export_gguf_adapter(adapter, beside)
  if with_torch:  # then the other references are here too
    yield _compare(
      "adapter folder → GGUF adapter → llama.cpp loads it",
      "adapter, llama.cpp",
      before,
      _llama_cpp(adapted, base, folder / "base.gguf", beside),
      LLAMA_CPP[kind],
      written=beside.stat().st_size,
    )
  import_gguf_adapter(beside, folder / "gguf-back", base=str(base))
  yield _compare(
    "GGUF adapter → import",
    "adapter, imported adapter",
    before,
    _ours(restore_adapter(load_adapter(folder / "gguf-back"))),
    ROUND,
    written=files_size(folder / "gguf-back"),
  )

  for format, bound in BOUNDS.items():
    file = folder / f"{format}.gguf"
    write_gguf_of(merged, file, kind=format)
    name = format.removeprefix("gguf-").upper()
    stand_in = gguf_folder(file)
    here = _ours(load_classifier(stand_in))
    shutil.rmtree(stand_in)  # in the user's cache, for a file that won't stay
    yield _compare(
      f"merge → GGUF in {name} → read here",
      f"adapter, {name}",
      before,
      here,
      bound,
      exact=name == "F16",  # eight bits, or of mantissa, may change a word
      written=file.stat().st_size,
    )
    if with_torch:
      yield _compare(
        f"GGUF in {name} → torch loads it",
        f"{name} here, {name} in torch",
        here,
        _theirs(*reference.decoder(base, gguf=file)),
        ROUND,
      )


def _config(folder: Path, base: Path) -> ConfigDict:
  """The language config on LINES, at rates that move a random decoder."""
  config = language.get_config()
  file = folder / "lines.txt"
  file.write_text("\n".join(LINES), encoding="utf-8")
  config.update_from_flattened_dict(
    {
      "model.name": str(base),
      "data.train": str(file),
      "data.cache_dir": str(folder / "tokens"),
      "data.max_length": 24,
      "optim.epochs": 4,
      "optim.adapter_lr": 0.1,
      "vera.rank": 16,
    }
  )
  return config


def _compare(
  arrow: str,
  compared: str,
  one: Answers,
  two: Answers,
  bound: float,
  *,
  exact: bool = True,
  **more: Any,
) -> Step:
  """A step between two answers; `exact`: no text may change."""
  same = [a == b for a, b in zip(one.texts, two.texts, strict=True)]
  return Step(
    arrow,
    f"logits: {compared}",
    largest(one.logits, two.logits),
    bound,
    texts=Texts(sum(same), len(same), len(same) if exact else 0),
    **more,
  )


def _ours(decoder: Classifier, *, keep_adapter: bool = False) -> Answers:
  """Logits with an adapter beside the weights; texts with it merged or kept."""
  generator = Generator(decoder, keep_adapter=keep_adapter, rows=len(PROMPTS))
  found = _all_logits(decoder.module, decoder.variables, jnp.asarray(IDS))
  texts = generator.texts(PROMPTS, max_new_tokens=NEW)
  return Answers(np.asarray(found), texts)


@partial(jax.jit, static_argnums=0)
def _all_logits(module: Any, variables: Any, ids: jax.Array) -> jax.Array:
  return logits(module.apply(variables, ids))


def _llama_cpp(
  decoder: Classifier, base: Path, file: Path, adapter: Path
) -> Answers:
  """The base as a GGUF file in float32, and the adapter, in llama.cpp."""
  from benchmarks.llama_cpp import LlamaCpp

  write_gguf_of(base, file, kind="gguf-f32")
  generator = Generator(decoder, rows=1)
  model = LlamaCpp(file, adapter=adapter)
  texts = []
  for prompt in PROMPTS:
    ids = generator.encode(prompt, max_new_tokens=NEW)
    (answer,) = model.greedy([ids], NEW)
    ends = [place for place, i in enumerate(answer) if i in generator.eos]
    texts.append(generator.decode(answer[: min(ends, default=NEW)]))
  return Answers(np.stack([model.logits(row) for row in IDS.tolist()]), texts)


def _theirs(model: Any, tokenizer: Any) -> Answers:
  texts = reference.texts(model, tokenizer, PROMPTS, new=NEW)
  return Answers(reference.next_words(model, IDS), texts)
