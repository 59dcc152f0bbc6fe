"""Tiny random decoders as folders in Hugging Face's layout, without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, LAYERS, HEADS, GROUPS, INNER, ROWS = 64, 2, 4, 2, 96, 48
TEXTS = [
  "the river  runs 12 345,6 low\n\n\n in the river",
  " The RIVER'LL run, don't: it\tis (low) ½ naïve 你好 😀\r\n",
  "<end>the<note>river<end>",
  "",
]
LLAMA: dict[str, Any] = {
  "hidden_size": WIDTH,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": HEADS,
  "num_key_value_heads": GROUPS,
  "head_dim": WIDTH // HEADS,
  "intermediate_size": INNER,
  "max_position_embeddings": 32,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "hidden_act": "silu",
}
KINDS: dict[str, dict[str, Any]] = {
  "llama": LLAMA,
  "mistral": {**LLAMA, "sliding_window": 3},
  "qwen2": LLAMA,
  "qwen3": {**LLAMA, "head_dim": 32},
  "gemma3_text": {
    **{name: x for name, x in LLAMA.items() if name != "hidden_act"},
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 32,
    "rope_local_base_freq": 50.0,
  },
  "gpt2": {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": INNER,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
  },
}


def tensors_of(
  kind: str, *, tied: bool = True, rows: int = ROWS
) -> dict[str, np.ndarray]:
  """Random tensors that float16 holds exactly, norms and biases too."""
  shapes: dict[str, tuple[int, ...]] = {}
  if kind == "gpt2":
    shapes = {"wte.weight": (rows, WIDTH), "wpe.weight": (32, WIDTH)}
    norms = ["ln_f"]
    for i in range(LAYERS):
      norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
      for name, inner, outer in (
        ("attn.c_attn", WIDTH, 3 * WIDTH),
        ("attn.c_proj", WIDTH, WIDTH),
        ("mlp.c_fc", WIDTH, INNER),
        ("mlp.c_proj", INNER, WIDTH),
      ):
        shapes[f"h.{i}.{name}.weight"] = inner, outer
        shapes[f"h.{i}.{name}.bias"] = (outer,)
    for name in norms:
      shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}
  else:
    size = KINDS[kind]["head_dim"]
    shapes = {"embed_tokens.weight": (rows, WIDTH), "norm.weight": (WIDTH,)}
    for i in range(LAYERS):
      layer = f"layers.{i}."
      for name, outer, inner in (
        ("self_attn.q_proj", HEADS * size, WIDTH),
        ("self_attn.k_proj", GROUPS * size, WIDTH),
        ("self_attn.v_proj", GROUPS * size, WIDTH),
        ("self_attn.o_proj", WIDTH, HEADS * size),
        ("mlp.gate_proj", INNER, WIDTH),
        ("mlp.up_proj", INNER, WIDTH),
        ("mlp.down_proj", WIDTH, INNER),
      ):
        shapes[f"{layer}{name}.weight"] = outer, inner
        if kind == "qwen2" and name[10:] in ("q_proj", "k_proj", "v_proj"):
          shapes[f"{layer}{name}.bias"] = (outer,)
      norms = ["input_layernorm", "post_attention_layernorm"]
      if kind == "gemma3_text":
        norms += [f"{x}_feedforward_layernorm" for x in ("pre", "post")]
      for name in norms:
        shapes[f"{layer}{name}.weight"] = (WIDTH,)
      if kind in ("qwen3", "gemma3_text"):
        for name in ("q_norm", "k_norm"):
          shapes[f"{layer}self_attn.{name}.weight"] = (size,)
    shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    if not tied:
      shapes["lm_head.weight"] = rows, WIDTH
  rng = np.random.default_rng(0)
  return {
    name: (0.2 * rng.standard_normal(shape) + (len(shape) == 1))
    .astype(np.float16)
    .astype(np.float32)
    for name, shape in shapes.items()
  }


def byte_level(folder: Path, rule: str) -> int:
  """A tokenizer with merges learned under a rule of `RULES`; its last id."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, trainers

  from vera_jax.models.gguf_tokenizer import _cut

  made = Tokenizer(models.BPE())
  made.pre_tokenizer, made.decoder = _cut(rule), decoders.ByteLevel()
  made.train_from_iterator(
    ["the river runs low the river 12 12 don't don't run run"] * 3,
    trainers.BpeTrainer(vocab_size=ROWS - 3, show_progress=False),
  )
  made.add_special_tokens([AddedToken("<end>", normalized=False)])
  made.add_tokens([AddedToken("<note>", normalized=False)])
  made.save(str(folder / "tokenizer.json"))
  about = {"tokenizer_class": "PreTrainedTokenizerFast"}
  about |= {"eos_token": "<end>", "pad_token": "<end>"}
  each = "{{ message.content }}<end>"
  loop = "{% for message in messages %}" + each + "{% endfor %}"
  about["chat_template"] = loop
  (folder / "tokenizer_config.json").write_text(json.dumps(about))
  return made.get_vocab_size() - 1


def random_folder(
  folder: Path, kind: str, *, tied: bool = True, rows: int = ROWS, **more
) -> Path:
  """A decoder of `KINDS` with a tokenizer; more keywords are config.json's."""
  folder.mkdir(exist_ok=True)
  end = byte_level(folder, "words") - 1
  fields = {
    "model_type": kind,
    "vocab_size": rows,
    "tie_word_embeddings": tied,
    "eos_token_id": end,
    "pad_token_id": end,
    "bos_token_id": None,
    **KINDS[kind],
    **more,
  }
  (folder / "config.json").write_text(json.dumps(fields))
  save_file(
    tensors_of(kind, tied=tied, rows=rows), folder / "model.safetensors"
  )
  return folder
