"""Converts textgenrnn's character model to a folder in Hugging Face's layout.

  python -m experiments.convert_char_lstm

Its package (PyPI, textgenrnn 2.0.0) has the weights as Keras wrote them, in an
HDF5 file, and the characters' numbers in a JSON file beside it. Both become
networks/textgenrnn; the package itself, which needs TensorFlow, is not
imported.

The LSTMs were trained by cuDNN, whose layout Keras keeps: gates in the order
i, f, g, o; a gate's recurrent kernel is transposed; its input kernel's numbers
lie as those of the transposed kernel do, in the shape of the plain one; and
there are two biases, which are added.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from experiments import cli
from experiments.convert import NETWORKS, convert, package_file
from vera_jax.files import read_json, write_json

PACKAGE = "textgenrnn"
WEIGHTS = "textgenrnn/textgenrnn_weights.hdf5"
WEIGHTS_SHA256 = (
  "6a89ca4235ed9f00be7b2acd65d5fe4a099967d676bfe20afb696106286ffbca"
)
VOCABULARY = "textgenrnn/textgenrnn_vocab.json"
VOCABULARY_SHA256 = (
  "f9c6c0db9b07fb57da023d32df66e16a488d086c138e15706307bb5177c2be74"
)
FOLDER = NETWORKS / "textgenrnn"
LSTM = ("kernel", "recurrent_kernel", "bias")
ARRAYS = {
  "embedding": ("embeddings",),
  "rnn_1": LSTM,
  "rnn_2": LSTM,
  "attention": ("attention_W",),
  "output": ("kernel", "bias"),
}
WINDOW = 40  # textgenrnn's max_length
ENDS, PADDING = "<s>", "<pad>"  # <s> begins a text and ends it; 0 has no name
GATES = "ifgo"  # as cuDNN, Keras and flax have them


def main() -> None:
  file = package_file(PACKAGE, WEIGHTS, sha256=WEIGHTS_SHA256)
  numbers = read_json(
    package_file(PACKAGE, VOCABULARY, sha256=VOCABULARY_SHA256)
  )

  def fill(new: Path) -> None:
    tensors = named_as_here(read_arrays(file))
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
    save_file(tensors, new / "model.safetensors")

  convert(FOLDER, fill)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
  """Keras's arrays by "layer/name", which the file has in nested groups."""
  import h5py

  with h5py.File(file) as groups:
    return {
      f"{layer}/{name}": np.asarray(groups[layer][layer][f"{name}:0"])
      for layer, names in ARRAYS.items()
      for name in names
    }


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


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
