"""An adapter's model card: README.md, made from what adapter.json says.

The hub shows it as the adapter's page, and reads the lines between the dashes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vera_jax.adapters.methods import METHODS
from vera_jax.hub import PACKAGE, is_here, public_name
from vera_jax.terminal import printable

CARD = "README.md"
# The kinds of models that write texts and that tag words.
WRITES, TAGS = "language_modelling", "token_classification"
SEES = "image_size"  # a field that adapters of images have
UNREADABLE = "unreadable"  # in what is said of a split of images


def model_card(about: Mapping[str, Any]) -> str:
  """The card; what adapter.json leaves out is left out here as well."""
  base, method = str(about.get("base")), str(about.get("method"))
  task, use = "text-classification", USE + PEFT
  if about.get("kind") == WRITES:
    task, use = "text-generation", USE_OF_WORDS + PEFT_OF_WORDS
  elif about.get("kind") == TAGS:  # PEFT gets no such adapters from here
    task, use = "token-classification", USE
  elif SEES in about:
    task, use = "image-classification", USE_OF_IMAGES + PEFT_OF_IMAGES
  tags = ["vera_jax", method, task]
  lines = ["---", "library_name: vera_jax"]
  if about.get("base") is None:
    tags, use = tags[:2], USE_OF_OWN
  elif not base.startswith(PACKAGE) and not is_here(base):
    lines.append(f"base_model: {json.dumps(base)}")  # a hub id, it links there
  lines += [f"tags: {json.dumps(tags)}", "---", ""]
  lines += [f"# {_cell(method)} adapter for {_cell(_task(about))}", ""]
  lines += ["| | |", "| --- | --- |"]
  lines += [f"| {name} | {_cell(text)} |" for name, text in _facts(about)]
  return "\n".join([*lines, LOADING, use])


def peft_card(about: Mapping[str, Any], base: str) -> str:
  """The card of an adapter that was written in PEFT's format.

  Args:
    about: what our adapter.json has.
    base: as adapter_config.json names it.
  """
  lines = ["---", "library_name: peft"]
  if not is_here(base):
    lines.append(f"base_model: {json.dumps(base)}")
  lines += [f"tags: {json.dumps([str(about.get('method')), 'vera_jax'])}"]
  lines += ["---", "", f"# PEFT adapter for {_cell(_task(about))}", ""]
  lines += ["| | |", "| --- | --- |"]
  lines += [f"| {name} | {_cell(text)} |" for name, text in _facts(about)]
  return "\n".join([*lines, OF_PEFT])


def published(about: Mapping[str, Any]) -> dict[str, Any]:
  """adapter.json as others may read it: without paths of this machine.

  The base is named as `public_name` does, and images that could not be read are
  counted.
  """
  shown = dict(about)
  if isinstance(base := about.get("base"), str):
    shown["base"] = public_name(base)
  if isinstance(data := about.get("data"), dict):
    shown["data"] = {
      split: {**facts, UNREADABLE: len(facts[UNREADABLE])}
      if isinstance(facts, dict) and isinstance(facts.get(UNREADABLE), list)
      else facts
      for split, facts in data.items()
    }
  return shown


def _facts(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """What there is to say, in the table's order."""

  def group(name: str) -> dict[str, Any]:
    value = about.get(name)
    return value if isinstance(value, dict) else {}

  settings = group("settings")
  for name in str(about.get("method")).split("+"):
    line = METHODS.get(name)
    yield "method", f"{line.title}, arXiv {line.paper}" if line else name
    chosen = settings.get(name, settings)
    chosen = chosen if isinstance(chosen, dict) else {}
    for key, _, text in line.described() if line else ():
      if chosen.get(key) not in (None, ""):
        yield key, f"{_listed(chosen[key])} ({text})"
  if about.get("base") is not None:
    yield "base", public_name(str(about["base"]))
  if fingerprint := about.get("base_fingerprint"):
    yield "fingerprint of the base's weights", str(fingerprint)
  if (quantise := about.get("quantise") or "none") != "none":
    codes = "the file's own" if quantise == "keep" else quantise
    yield "base quantised", f"{codes} codes"
  if digest := about.get("projection_digest"):
    yield "digest of A and B", str(digest)
  sizes = [
    f"{split} {facts.get('examples')} examples, sha256 {facts['fingerprint']}"
    for split, facts in group("data").items()
    if isinstance(facts, dict) and "fingerprint" in facts
  ]
  yield "data", "; ".join([_task(about), *sizes])
  if isinstance(score := about.get("score"), int | float):
    reached = f"{about.get('score_name')} {score:.4f}"
    yield "score", f"{reached} on the dev data, one run's best epoch"
  if about.get("seed") is not None:
    yield "seed", str(about["seed"])
  if labels := about.get("labels"):
    yield "labels", ", ".join(map(str, labels))
  if about.get("template"):
    yield "prompts are put into the template", str(about["template"])
  if about.get(SEES):
    yield "images have", f"{about[SEES]} pixels along each side"
  if about.get("max_length"):
    yield "texts are cut at", f"{about['max_length']} tokens"
  if group("parameters"):
    yield "parameters", _pairs(group("parameters"))
  if group("versions"):
    yield "versions", _pairs(group("versions"))


def _task(about: Mapping[str, Any]) -> str:
  return str(about.get("task") or "a model of one's own")


def _listed(value: Any) -> str:
  """A value, or a list's entries."""
  entries = value if isinstance(value, list | tuple) else [value]
  return ", ".join(map(str, entries))


def _pairs(values: Mapping[str, Any]) -> str:
  """Each name with its value."""
  return ", ".join(f"{name} {value}" for name, value in values.items())


def _cell(text: Any) -> str:
  """Text that stays in its cell, and is taken for no HTML and no command."""
  plain = printable(" ".join(str(text).split()))
  return plain.replace("|", "\\|").replace("<", "&lt;")


LOADING = """
An adapter is two small files beside its frozen base. Loading it checks that the
base's weights have the fingerprint above, and that A and B, where it has them,
come out with their digest. ADAPTER below is this folder, or its hub id as
owner/name.
"""
USE = """\
## In vera_jax

```
vera-jax predict --adapter=ADAPTER --input=texts.tsv
vera-jax merge --adapter=ADAPTER --out=FOLDER
```

```python
import vera_jax

classifier = vera_jax.restore_adapter(vera_jax.load_adapter("ADAPTER"))
vera_jax.Predictor(classifier).answers(["A first text.", "A second one."])
```

Where the base is not found under its name, `--base=FOLDER` (or the second
argument of `restore_adapter`) says where it is.
"""
USE_OF_OWN = """\
## In vera_jax

The base is a linen model that whoever loads this has. Adapted with the method,
settings and targets above, it takes the adapter by

```python
variables = adapted.load("ADAPTER", pretrained_variables, example_inputs)
```
"""
USE_OF_WORDS = """\
## In vera_jax

```
vera-jax generate --adapter=ADAPTER --prompt=TEXT
vera-jax merge --adapter=ADAPTER --out=FOLDER
```

Where the base is not found under its name, `--base=FOLDER` says where it is.
"""
CLASSIFIER = """AutoModelForSequenceClassification.from_pretrained(
  "BASE", num_labels=2  # as many as there are labels, 1 for a regression
)"""
PEFT = f"""
## In PEFT

Where PEFT has the method, and transformers the base, the adapter can be written
in PEFT's format, without torch:

```
vera-jax peft export --adapter=ADAPTER --out=PEFT_ADAPTER
```

```python
import peft, transformers

base = transformers.{CLASSIFIER}
model = peft.PeftModel.from_pretrained(base, "PEFT_ADAPTER")
```
"""
PEFT_OF_WORDS = PEFT.replace(
  CLASSIFIER, 'AutoModelForCausalLM.from_pretrained("BASE")'
)
OF_PEFT = """
Trained with vera_jax, and written for PEFT: `peft.PeftModel.from_pretrained`
puts it on its base. Back to vera_jax, which checks the weights of the base:

```
vera-jax peft import --adapter=ADAPTER --out=FOLDER
```
"""
# the same, but for the commands and classes of images
USE_OF_IMAGES = (
  USE.replace("--input=texts.tsv", "--input=FOLDER_OF_IMAGES")
  .replace("Predictor", "ImagePredictor")
  .replace('["A first text.", "A second one."]', '["a.jpg", "b.png"]')
)
PEFT_OF_IMAGES = PEFT.replace(
  "AutoModelForSequence", "AutoModelForImage"
).replace(", 1 for a regression", "")
