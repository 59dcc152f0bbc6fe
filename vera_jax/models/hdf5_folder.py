"""textgenrnn's character model as a folder in Hugging Face's layout.

Its package (PyPI, textgenrnn 2.0.0) has the weights as Keras wrote them, in an
HDF5 file, and the characters' numbers in a JSON file beside it. Everything here
that takes a model takes a folder, so the two get one, in the cache and by their
checksums. The package itself, which needs TensorFlow, is not imported.

The LSTMs were trained by cuDNN, whose layout Keras keeps: gates in the order
i, f, g, o; a gate's recurrent kernel is transposed; its input kernel's numbers
lie as those of the transposed kernel do, in the shape of the plain one; and
there are two biases, which are added.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from vera_jax.errors import UserError
from vera_jax.files import cached_folder, read_json, sha256_of, write_json

SUFFIX = ".hdf5"
WEIGHTS = "model.safetensors"
LAYOUT = 1  # counted up when the folder of the same file becomes another
SHA256 = "6a89ca4235ed9f00be7b2acd65d5fe4a099967d676bfe20afb696106286ffbca"
VOCABULARY = "textgenrnn_vocab.json"
VOCABULARY_SHA256 = (
  "f9c6c0db9b07fb57da023d32df66e16a488d086c138e15706307bb5177c2be74"
)
WINDOW = 40  # textgenrnn's max_length
ENDS, PADDING = "<s>", "<pad>"  # <s> begins a text and ends it; 0 has no name
GATES = "ifgo"  # as cuDNN, Keras and flax have them


def hdf5_folder(file: Path) -> Path:
  """The folder in Hugging Face's layout that holds an HDF5 file's network.

  It is made once, and found again in the time of a checksum.

  Raises:
    UserError: the file is another than textgenrnn's, or can't be read.
  """
  file = file.expanduser().resolve()
  vocabulary = file.with_name(VOCABULARY)
  known = {file: SHA256, vocabulary: VOCABULARY_SHA256}
  for one, expected in known.items():
    if (found := sha256_of(one)) != expected:
      raise UserError(
        f"{one} is not the file of textgenrnn 2.0.0, the only one that is known"
        f" here: its sha256 is {found}."
      )

  def fill(new: Path) -> None:
    tensors, numbers = named_as_here(read_arrays(file)), read_json(vocabulary)
    vocab, width = tensors["embeddings.weight"].shape
    fields = {
      "architectures": ["CharLstmForCausalLM"],
      "model_type": "char_lstm",
      "vocab_size": vocab,
      "embedding_size": width,
      "hidden_size": len(tensors["layer.0.hi.weight"]),
      "num_hidden_layers": 2,
      "window": WINDOW,
      "bos_token_id": numbers[ENDS],
      "eos_token_id": numbers[ENDS],
    }
    write_json(new / "config.json", fields)
    write_tokenizer(new, numbers)
    save_file(tensors, new / WEIGHTS)

  return cached_folder("hdf5", file, f"{LAYOUT}-{SHA256[:32]}", fill)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
  """An HDF5 file's arrays, by the last words of their names.

  Raises:
    UserError: h5py is not installed.
  """
  try:
    import h5py
  except ImportError as error:
    raise UserError(
      f"{file} needs the package h5py: pip install -r requirements-networks.txt"
    ) from error
  found: dict[str, np.ndarray] = {}

  def note(name: str, entry: Any) -> None:
    if isinstance(entry, h5py.Dataset):
      layer, leaf = name.split("/")[-2:]
      found[f"{layer}/{leaf.removesuffix(':0')}"] = np.asarray(entry)

  with h5py.File(file) as opened:
    opened.visititems(note)
  return found


def named_as_here(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Keras's arrays as our tensors, cuDNN's layout undone."""
  tensors = {
    "embeddings.weight": arrays["embedding/embeddings"],
    "attention.weight": arrays["attention/attention_W"],
    "lm_head.weight": arrays["output/kernel"],
    "lm_head.bias": arrays["output/bias"],
  }
  for number in range(2):
    layer = f"rnn_{number + 1}"
    parts = {
      "i": map(input_kernel, np.split(arrays[f"{layer}/kernel"], 4, axis=1)),
      "h": [x.T for x in np.split(arrays[f"{layer}/recurrent_kernel"], 4, 1)],
    }
    biases = arrays[f"{layer}/bias"].reshape(2, 4, -1).sum(0)
    for side, kernels in parts.items():
      for gate, kernel in zip(GATES, kernels, strict=True):
        tensors[f"layer.{number}.{side}{gate}.weight"] = kernel
    for gate, bias in zip(GATES, biases, strict=True):
      tensors[f"layer.{number}.h{gate}.bias"] = bias
  return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def input_kernel(
  stored: Float[np.ndarray, "i o"],
) -> Float[np.ndarray, "i o"]:
  """A gate's kernel, whose transposed one lies in the memory of `stored`."""
  return np.ascontiguousarray(stored).reshape(stored.shape[::-1]).T


def write_tokenizer(folder: Path, numbers: dict[str, int]) -> None:
  """tokenizer.json and its config: a token for each character.

  A character that has no number is 0, as where textgenrnn writes texts.
  """
  from tokenizers import AddedToken, Regex, Tokenizer, decoders
  from tokenizers.models import WordLevel
  from tokenizers.pre_tokenizers import Split
  from tokenizers.processors import TemplateProcessing

  made = Tokenizer(WordLevel({PADDING: 0, **numbers}, unk_token=PADDING))
  made.add_special_tokens([AddedToken(PADDING), AddedToken(ENDS)])
  made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
  made.post_processor = TemplateProcessing(
    single=f"{ENDS} $A", special_tokens=[(ENDS, numbers[ENDS])]
  )
  made.decoder = decoders.Fuse()
  made.save(str(folder / "tokenizer.json"))
  write_json(
    folder / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": ENDS,
      "eos_token": ENDS,
      "pad_token": PADDING,
      "unk_token": PADDING,
      "clean_up_tokenization_spaces": False,
    },
  )
