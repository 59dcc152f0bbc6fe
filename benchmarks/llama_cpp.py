"""llama.cpp by its C interface, as the package llama-cpp-py-sync carries it.

Imports nothing of vera_jax, whose libraries would count as its own memory.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

# called for each line of its log, and kept as long as the library is
SILENT = get_ffi().callback(
  "void(enum ggml_log_level, const char *, void *)", lambda *_: None
)
FLOAT32, OFF = 0, 0  # of the cache; of flash attention, which rounds to float16


def quantise(source: Path, file: Path, ftype: int) -> None:
  """Write a model anew, as llama-quantize does; 0 is float32."""
  ffi, lib = get_ffi(), get_lib()
  lib.llama_log_set(SILENT, ffi.NULL)
  options = lib.llama_model_quantize_default_params()
  options.ftype, options.allow_requantize = ftype, True
  failed = lib.llama_model_quantize(
    str(source).encode(),
    str(file).encode(),
    ffi.new("struct llama_model_quantize_params *", options),
  )
  if failed:
    raise ValueError(f"llama.cpp can't quantise {source}.")


class LlamaCpp:
  """A GGUF file in llama.cpp, with room for some texts at once.

  Args:
    file: of the model.
    adapter: a file of a LoRA adapter that is put on it, or None.
    texts: that are continued together.
    room: tokens of one of them, its prompt included.
    threads: of the CPU.
  """

  def __init__(
    self,
    file: Path,
    *,
    adapter: Path | None = None,
    texts: int = 1,
    room: int = 128,
    threads: int = 1,
  ) -> None:
    self.ffi, self.lib = get_ffi(), get_lib()
    self.lib.llama_log_set(SILENT, self.ffi.NULL)
    options = self.lib.llama_model_default_params()
    options.n_gpu_layers = 0
    self.model = self.lib.llama_model_load_from_file(
      str(file).encode(), options
    )
    settings = self.lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = texts * room
    settings.n_seq_max = texts
    settings.n_threads = settings.n_threads_batch = threads
    settings.type_k = settings.type_v = FLOAT32
    settings.flash_attn_type = OFF
    self.context = self.lib.llama_init_from_model(self.model, settings)
    if not self.model or not self.context:
      raise ValueError(f"llama.cpp can't load {file}.")
    self.size = int(self.lib.llama_model_size(self.model))
    self.words = self.lib.llama_vocab_n_tokens(
      self.lib.llama_model_get_vocab(self.model)
    )
    if adapter is not None:
      loaded = self.lib.llama_adapter_lora_init(
        self.model, str(adapter).encode()
      )
      if not loaded:
        raise ValueError(f"llama.cpp can't load {adapter}.")
      which = self.ffi.new("struct llama_adapter_lora *[1]", [loaded])
      scale = self.ffi.new("float[1]", [1.0])
      self.lib.llama_set_adapters_lora(self.context, which, 1, scale)

  def logits(self, ids: Sequence[int]) -> np.ndarray:
    """Of each token of one text, the next one's logits."""
    self._forget()
    rows = self._decode([(i, at, 0, True) for at, i in enumerate(ids)])
    return np.stack([self._row(row).copy() for row in rows])

  def greedy(self, texts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """The likeliest tokens behind each text, so many, whatever they are."""
    self._forget()
    tokens = [
      (i, at, text, at == len(ids) - 1)
      for text, ids in enumerate(texts)
      for at, i in enumerate(ids)
    ]
    made: list[list[int]] = [[] for _ in texts]
    for step in range(new):
      rows = self._decode(tokens)
      for ids, row in zip(made, rows, strict=True):
        ids.append(int(self._row(row).argmax()))
      tokens = [
        (made[text][-1], len(ids) + step, text, True)
        for text, ids in enumerate(texts)
      ]
    return made

  def _forget(self) -> None:
    memory = self.lib.llama_get_memory(self.context)
    self.lib.llama_memory_clear(memory, True)

  def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
    """Runs (token, position, text, whether its logits are asked for) of a
    batch; the places of those whose logits are."""
    batch = self.lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for row, (token, position, text, asked) in enumerate(tokens):
      batch.token[row], batch.pos[row] = token, position
      batch.n_seq_id[row], batch.seq_id[row][0] = 1, text
      batch.logits[row] = asked
    failed = self.lib.llama_decode(self.context, batch)
    self.lib.llama_batch_free(batch)
    if failed:
      raise ValueError(f"llama.cpp can't go on: {failed}.")
    return [row for row, token in enumerate(tokens) if token[-1]]

  def _row(self, row: int) -> np.ndarray:
    data = self.lib.llama_get_logits_ith(self.context, row)
    size = self.words * np.dtype(np.float32).itemsize
    return np.frombuffer(self.ffi.buffer(data, size), np.float32)
