"""Makes the tiny checkpoints that tests/models compares with.

  python tests/golden/make_models.py

Needs torch and transformers, which nothing else in the project imports
outside tests. Each folder gets config.json, model.safetensors and
expected.json: a padded batch and the logits that transformers computes for it
in float32. Two of the checkpoints are stored in half precision.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SIZES = {
  "vocab_size": 80,
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "max_position_embeddings": 40,
}
CHECKPOINTS = {
  "bert_three_labels": ("Bert", 3, "gelu", torch.float32),
  "bert_regression": ("Bert", 1, "gelu_new", torch.bfloat16),
  "roberta_three_labels": ("Roberta", 3, "gelu", torch.float32),
  "roberta_regression": ("Roberta", 1, "relu", torch.float16),
}
LENGTHS = (12, 7, 3)


def make_model(family, labels, act, dtype):
  """Random weights, biases and norms included, rounded to the stored type."""
  roberta = family == "Roberta"
  config = getattr(transformers, f"{family}Config")(
    **SIZES,
    hidden_act=act,
    num_labels=labels,
    pad_token_id=1 if roberta else 0,
    type_vocab_size=1 if roberta else 2,
    layer_norm_eps=1e-5 if roberta else 1e-12,
  )
  name = f"{family}ForSequenceClassification"
  model = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for path, value in model.named_parameters():
      value.normal_(std=0.2)
      if path.endswith("LayerNorm.weight"):
        value.add_(1.0)
      value.copy_(value.to(dtype))
  return model


def make_batch(config):
  """Rows of several lengths, padded, the second half of type 1 in BERT."""
  shape = (len(LENGTHS), max(LENGTHS))
  ids = torch.randint(4, config.vocab_size, shape)
  types = torch.zeros(shape, dtype=torch.long)
  for row, length in enumerate(LENGTHS):
    ids[row, length:] = config.pad_token_id
    types[row, length // 2 : length] = config.type_vocab_size - 1
  return {"input_ids": ids, "token_type_ids": types}


def main():
  for number, (name, recipe) in enumerate(CHECKPOINTS.items()):
    torch.manual_seed(10 + number)
    model, dtype = make_model(*recipe), recipe[-1]
    batch = make_batch(model.config)
    mask = (batch["input_ids"] != model.config.pad_token_id).long()
    with torch.no_grad():
      logits = model(**batch, attention_mask=mask).logits
    folder = Path(__file__).parent / name
    folder.mkdir(exist_ok=True)
    tensors = {k: v.to(dtype) for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    expected = {k: v.tolist() for k, v in {**batch, "logits": logits}.items()}
    text = json.dumps(expected)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
