"""The clean files that each reader of `readers.py` reads, small ones."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {
  "hidden_size": 8,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 12,
}
TEXTS = {**WIDTHS, "vocab_size": 30, "max_position_embeddings": 24}
DECODER = {**TEXTS, "num_key_value_heads": 1, "head_dim": 4}
IMAGES = {**WIDTHS, "image_size": 8, "patch_size": 4}
STAGE = {"layers": 1, "kernel": 3, "stride": 1, "expand": 1, "width": 4}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
# config.json's fields by model_type.
MODELS: dict[str, dict[str, Any]] = {
  "bert": TEXTS,
  "roberta": {**TEXTS, "pad_token_id": 1},
  "distilbert": {
    "vocab_size": 30,
    "max_position_embeddings": 24,
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
  },
  "modernbert": {**TEXTS, "num_hidden_layers": 3, "local_attention": 8},
  "gpt2": {
    "vocab_size": 30,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 24,
  },
  "llama": {**DECODER, "rope_theta": 100.0, "rope_scaling": ROPE},
  "mistral": {**DECODER, "sliding_window": 4},
  "qwen2": {**DECODER, "use_sliding_window": True, "max_window_layers": 1},
  "qwen3": DECODER,
  "gemma3_text": {**DECODER, "sliding_window": 4, "sliding_window_pattern": 2},
  # of a network that sees too, the part that reads texts
  "gemma3": {"text_config": {**DECODER, "rope_local_base_freq": 50.0}},
  "vit": IMAGES,
  "dinov2": {**IMAGES, "mlp_ratio": 2},
  "efficientnet_lite": {
    "stem_width": 4,
    "stages": [{**STAGE, "layers": 2}, {**STAGE, "stride": 2, "expand": 2}],
    "last_width": 12,
    "image_size": 8,
  },
  "char_lstm": {
    "vocab_size": 30,
    "embedding_size": 5,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "window": 6,
  },
}
WORDS = [f"word{i}" for i in range(25)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROWS = [
  {"premise": f"a fine film {i}", "hypothesis": "it is fine", "label": word}
  for i, word in enumerate(["no", "yes"] * 4)
]


def _json(path: Path, value: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def _lines(path: Path, rows: list[Any]) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(
  folder: Path, kind: str, *, shards: int = 1, **more: Any
) -> dict[str, Any]:
  """A random classifier or decoder; returns its config.json."""
  from flax.traverse_util import unflatten_dict
  from safetensors.numpy import save_file

  from vera_jax.models.family import family_of, read_fields
  from vera_jax.models.hf_weights import to_hf
  from vera_jax.pretrained.blueprint import blueprint

  fields = {"model_type": kind, **MODELS[kind], **more}
  _json(folder / "config.json", fields)
  of_texts = read_fields(folder)
  head = next(iter(family_of(of_texts).classes))
  plan = blueprint(of_texts, outputs=2, head=head, scan=False)
  rng = np.random.default_rng(0)
  leaves = {
    path: rng.standard_normal(leaf.shape).astype(np.float32)
    for path, leaf in sorted(plan.shapes.items())
  }
  tensors = to_hf(unflatten_dict(leaves), plan.config)
  if shards == 1:
    save_file(tensors, folder / "model.safetensors")
    return fields
  places = {name: i % shards for i, name in enumerate(tensors)}
  names = [
    f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)
  ]
  for i, name in enumerate(names):
    own = {key: x for key, x in tensors.items() if places[key] == i}
    save_file(own, folder / name)
  index = {key: names[i] for key, i in places.items()}
  about = {"metadata": {"total_size": 9}, "weight_map": index}
  _json(folder / "model.safetensors.index.json", about)
  return fields


def write_merged(folder: Path) -> None:
  write_model(folder, "bert")
  about = {"task": "rte", "method": "vera", "max_length": 16}
  _json(folder / "merge.json", about)


def write_tokenizer(folder: Path) -> None:
  """A byte-level BPE with a chat template, as decoders have it."""
  from tests.models.gguf_folders import byte_level

  byte_level(folder, "words")
  _json(folder / "config.json", {"model_type": "llama", **DECODER})
  _json(folder / "special_tokens_map.json", {"eos_token": "<end>"})


def write_template(folder: Path) -> None:
  """The same, with a template that marks answers, and one among several."""
  write_tokenizer(folder)
  said = "{% generation %}{{ message.content }}{% endgeneration %}"
  said = "{% if message.role == 'assistant' %}" + said + "{% else %}"
  said += "{{ message['content'] | trim }}{% endif %}{{ eos_token }}\n"
  loop = "{% for message in messages %}" + said + "{% endfor %}"
  (folder / "chat_template.jinja").write_text(loop)


def write_wordpiece(folder: Path) -> None:
  (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
  _json(folder / "config.json", {"model_type": "bert", **TEXTS})
  about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
  _json(folder / "tokenizer_config.json", about)


def write_merges(folder: Path) -> None:
  letters = [*"abdefilmnorstw", "Ġ"]
  names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "in", "fin"]
  _json(folder / "vocab.json", {name: i for i, name in enumerate(names)})
  (folder / "merges.txt").write_text("#version: 0.2\ni n\nf in\n")


def write_adapter(folder: Path, method: str) -> None:
  """A random adapter beside its base, without a checksum of the tensors."""
  from tests import random_adapter
  from vera_jax.adapters.files import ABOUT, SHA256
  from vera_jax.adapters.methods import links_of

  base, out = folder / "base", folder / "adapter"
  write_model(base, "bert")
  (link, *_) = links_of(method).values()
  usual = {name: default for name, default, _ in link.described()}
  usual |= {"rank": 2, "targets": ["query", "value"]}
  if method in random_adapter.SETTINGS:
    usual = {}
  random_adapter.write_adapter(out, method, base=base, **usual)
  written = json.loads((out / ABOUT).read_text())
  _json(out / ABOUT, {k: x for k, x in written.items() if k != SHA256})


def write_peft(folder: Path, form: str) -> None:
  """An adapter of ours that was written as one of PEFT's; DoRA is its LoRA."""
  from tests.random_adapter import write_adapter
  from vera_jax.peft_io import export_adapter

  base, ours = folder / "base", folder / "ours"
  write_model(base, "bert")
  write_adapter(ours, form, base=base)
  export_adapter(ours, folder / "adapter")


def write_gguf_adapter(folder: Path) -> None:
  """A LoRA adapter of llama.cpp's, and its base."""
  from tests.models.gguf_folders import random_folder
  from tests.random_adapter import write_adapter
  from vera_jax.peft_io.gguf import export_gguf_adapter

  base, ours = random_folder(folder / "base", "llama"), folder / "ours"
  write_adapter(ours, base=base, kind="language_modelling", targets=["q_proj"])
  export_gguf_adapter(ours, folder / "adapter.gguf")


def write_gguf(folder: Path, kind: str, *, form: str, parts: int = 1) -> None:
  import shutil

  from tests.models.gguf_folders import random_folder
  from vera_jax.export.gguf import write_gguf_of
  from vera_jax.models import gguf_file

  model = random_folder(folder / "model", kind)
  whole = folder / "model.gguf"
  write_gguf_of(model, whole, kind=form)
  shutil.rmtree(model)
  if parts == 1:
    return
  read = gguf_file.read_gguf(whole)
  keys = {"split.count": parts, "split.tensors.count": len(read.tensors)}
  for number in range(parts):
    tensors = {
      name: gguf_file.Written(x.format, x.shape, partial(read.values, name))
      for name, x in list(read.tensors.items())[number::parts]
    }
    first = read.metadata if number == 0 else {}
    file = folder / f"model-{number + 1:05}-of-{parts:05}.gguf"
    gguf_file.write_gguf(file, {**first, "split.no": number, **keys}, tensors)
  whole.unlink()


def write_decoder(folder: Path) -> None:
  from tests.models.gguf_folders import random_folder

  random_folder(folder, "llama")
  _json(folder / "generation_config.json", {"eos_token_id": [1, 2]})


def write_table(folder: Path, name: str) -> None:
  """`ROWS` in the format of a name's ending."""
  path = folder / name
  if path.suffix == ".parquet":
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
  elif path.suffix == ".json":
    _json(path, ROWS)
  elif path.suffix == ".jsonl":
    _lines(path, ROWS)
  else:
    apart = {".csv": ",", ".tsv": "\t"}[path.suffix]
    lines = [
      apart.join(row) for row in [list(ROWS[0]), *map(dict.values, ROWS)]
    ]
    path.write_text("\n".join(lines) + "\n")


def write_glue(folder: Path) -> None:
  from vera_jax.tasks.glue_data import file_name
  from vera_jax.tasks.glue_facts import TASKS

  for name in ("cola", "stsb", "mrpc"):
    task = TASKS[name]
    (folder / task.folder).mkdir()
    for split in task.splits:
      test = split in task.test_splits
      names = ["index", *task.file_columns, task.file_label]
      plain = task.headerless and not test
      names = list(task.headerless) if plain else names
      lines = [] if plain else ["\t".join(names)]
      for i in range(8):
        label = task.written[i % 2] if task.written else str(i / 2)
        row = {**dict.fromkeys(names, f"text {i}"), "index": str(i)}
        lines.append(
          "\t".join((row | {task.file_label: label})[n] for n in names)
        )
      path = folder / task.folder / file_name(split)
      path.write_text("\n".join([*lines, ""]))


def write_superglue(folder: Path) -> None:
  from tests.tasks import superglue_files

  superglue_files.write_superglue(folder)


def write_e2e(folder: Path) -> None:
  import gzip

  lines = [f"name : x{i // 2} || {i}.0 is a place .\n" for i in range(8)]
  text = "".join(lines).replace(" || ", "||").encode()
  (folder / "train.txt.gz").write_bytes(gzip.compress(text))
  (folder / "valid.txt").write_bytes(text)


def write_scoring(folder: Path) -> None:
  rows = "".join(f"name[x{i // 2}],it is a place\n" for i in range(8))
  (folder / "references.csv").write_text("mr,ref\n" + rows)
  (folder / "references.txt").write_text("it is\nthis\n\na place\n")
  (folder / "outputs.txt").write_text("it is a place\na place\n")


def write_language(folder: Path) -> None:
  (folder / "train.txt").write_text("a fine film\n" * 9 + "the naïve river\n")


def write_instructions(folder: Path) -> None:
  rows = [{"instruction": f"Add {i}.", "output": str(i)} for i in range(8)]
  _json(folder / "alpaca.json", [{**row, "input": ""} for row in rows])
  said = [
    [
      {"role": "user", "content": f"Add {i}."},
      {"role": "assistant", "content": str(i)},
    ]
    for i in range(8)
  ]
  _lines(folder / "messages.jsonl", [{"messages": one} for one in said])


def write_questions(folder: Path) -> None:
  turns = {"question_id": 1, "category": "math", "turns": ["Why?", "How?"]}
  _lines(folder / "judge.jsonl", [turns, {"question_id": 2, "text": "Who?"}])
  judged = {"question_id": 81, "model": "a", "turn": 1, "score": 7.5}
  _lines(folder / "judged.jsonl", [judged, {**judged, "turn": 2, "score": -1}])
  copa = {"premise": "It rains.", "question": "effect", "label": 0}
  _lines(folder / "copa.jsonl", [{**copa, "choice1": "wet", "choice2": "dry"}])
  choices = {"text": ["wet", "dry"], "label": ["A", "B"]}
  arc = {"question": "What?", "choices": choices, "answerKey": "B"}
  _json(folder / "arc.json", [arc])


def _write_preprocessor(folder: Path) -> None:
  from tests.pictures import PREPROCESSOR

  cut = {"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}
  about = {**PREPROCESSOR, **cut, "do_center_crop": True}
  _json(folder / "base" / "preprocessor_config.json", about)


def write_pictures(folder: Path) -> None:
  """Class folders with a picture of each format."""
  from tests.pictures import COLOURS, picture
  from vera_jax.data.image_files import SUFFIXES

  for number, (name, colour) in enumerate(COLOURS.items()):
    (folder / "data" / name).mkdir(parents=True)
    for i, suffix in enumerate((*SUFFIXES, ".png", ".png")):
      made = picture(colour, 100 * number + i)
      made.save(folder / "data" / name / f"{i}{suffix}")
  _write_preprocessor(folder)


def write_picture_table(folder: Path) -> None:
  import io

  import pyarrow
  from pyarrow import parquet

  from tests.pictures import COLOURS, picture

  rows = []
  for i in range(9):
    encoded = io.BytesIO()
    picture([*COLOURS.values()][i % 3], i).save(encoded, "PNG")
    image = {"bytes": encoded.getvalue(), "path": f"{i}.png"}
    rows.append({"image": image, "label": i % 3})
  features = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": list(COLOURS)},
  }
  about = json.dumps({"info": {"features": features}})
  table = pyarrow.Table.from_pylist(rows)
  table = table.replace_schema_metadata({"huggingface": about})
  (folder / "data").mkdir()
  parquet.write_table(table, folder / "data" / "train.parquet")
  _write_preprocessor(folder)


def write_run(folder: Path) -> None:
  """What a run leaves but for its checkpoints, and a sweep's folder."""
  from configs import rte
  from vera_jax.data.written import FOLDER
  from vera_jax.locks import locked

  config = json.loads(json.dumps(rte.get_config("large").to_dict()))
  epoch = {"epoch": 1, "step": 10, "train_loss": 0.7, "score": 0.6}
  epoch["collapsed"] = False
  result = {
    "task": "rte",
    "method": "vera",
    "seed": 0,
    "score_name": "accuracy",
    "best": epoch,
    "last": epoch,
    "history": [epoch],
    "parameters": {"adapter": 9, "head": 770, "frozen": 10**6},
    "seconds": 10.0,
    "config": config,
    "test": {"scores": {"BLEU": 0.6}, "inputs": 2, "missing": ""},
  }
  _json(folder / "sweep.json", {"title": "x", "runs": {"run": {}}})
  run = folder / "run"
  _json(run / "result.json", result)
  (run / "began").write_text("1700000000.5\n")
  _json(run / "config.json", config)
  _json(folder / "other" / "failed.json", {"reason": "NaN", "step": 3})
  _json(folder / "third" / "result.json", {**result, "seed": 1})
  lines = [{"step": i, "loss": 0.5, "grad_norm": 1.0} for i in range(1, 5)]
  _lines(run / "metrics.jsonl", [*lines, {"step": 4, "epoch": 1, "score": 0.5}])
  written = {"inputs": "a\nb", "outputs": "x y\nz", "references": "x\n\nz"}
  (run / FOLDER).mkdir()
  for name, text in written.items():
    (run / FOLDER / f"{name}.txt").write_text(text + "\n")
  with locked([run / "lock"]):
    owner = (run / "lock").read_text()
  (run / "lock").write_text(owner)


def sweep_plan(folder: Path) -> Any:
  """Three runs, by their ranks."""
  from ml_collections import ConfigDict

  from configs import rte
  from vera_jax.sweep.plan import make_plan

  fields = {"title": "ranks", "paper": "", "members": 2}
  ranks = tuple((("vera.rank", rank),) for rank in (2, 3, 4))
  base = rte.get_config("large")
  sweep = ConfigDict({**fields, "base": base, "overrides": ranks})
  return make_plan(sweep, folder)


def write_sweep(folder: Path) -> None:
  """A run that is done, one that failed and one that has begun."""
  from vera_jax.sweep.plan import write_plan

  plan = sweep_plan(folder)
  write_plan(plan)
  done, failed, begun = plan.runs
  best = {"epoch": 1, "step": 10, "score": 0.6, "collapsed": False}
  result = {"score_name": "accuracy", "best": best, "seconds": 9.0}
  config = json.loads(json.dumps(done.config.to_dict()))
  _json(done.folder / "result.json", {**result, "config": config})
  _json(failed.folder / "failed.json", {"failed": "the loss is NaN"})
  _json(begun.folder / "config.json", config)
  _lines(begun.folder / "metrics.jsonl", [{"step": 3, "loss": 0.5}])


def write_requests(folder: Path) -> None:
  """Bodies by the last word of their address; and adapters, a base."""
  from tests.models.gguf_folders import random_folder
  from tests.random_adapter import write_adapter

  base = random_folder(folder / "base", "llama")
  for name in ("ann", "bob"):
    ours = folder / "adapters" / name
    write_adapter(
      ours, base=base, kind="language_modelling", targets=["q_proj"]
    )
  asked = {"model": "ann", "max_tokens": 2, "seed": 1, "temperature": 0.5}
  asked |= {"top_p": 0.9, "top_k": 5, "stop": ["x"], "stream": False, "n": 1}
  bodies: dict[str, dict[str, Any]] = {
    "completions": {**asked, "prompt": ["the river", "low"], "logprobs": 2},
    "chat-completions": {
      **asked,
      "messages": [
        {"role": "user", "content": [{"type": "text", "text": "the river"}]}
      ],
      "stream": True,
      "stream_options": {"include_usage": True},
    },
    "classify": {"model": "ann", "input": [["the river", "low"]]},
    "load_lora_adapter": {"lora_name": "eve", "lora_path": "bob"},
    "unload_lora_adapter": {"lora_name": "eve"},
  }
  for name, body in bodies.items():
    _json(folder / "bodies" / f"{name}.json", body)
  (folder / "bodies" / "name.txt").write_text("ann")


CONFIG: Mapping[str, Any] = {"task": "rte", "seed": 0}
STATE = {"d": np.zeros(3, np.float32)}


def write_saves(folder: Path) -> None:
  from vera_jax.train.checkpoint import Checkpoints

  with Checkpoints(folder / "checkpoints", CONFIG) as saves:
    for step in (1, 2):
      saves.save(step, STATE, {"epoch": step})
