"""Makes beams.json: what transformers' beam search gives on small tables.

  python -m tests.golden.make_beams

Needs torch and transformers. The model is a table of logits by the two words
before (tests/generate/markov.py), drawn from the case's seed.
"""

import itertools
import json
from pathlib import Path

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.generate.markov import EOS, WORDS, random_table

FILE = Path(__file__).parent / "beams.json"
PROMPTS = ([5], [7, 3, 7, 3], [4, 4, 9])
NEW = 8


class MarkovConfig(PretrainedConfig):
  model_type = "markov"

  def __init__(self, **kwargs):
    self.vocab_size = WORDS
    self.num_hidden_layers = 1
    super().__init__(**kwargs)


class Markov(PreTrainedModel, GenerationMixin):
  config_class = MarkovConfig
  main_input_name = "input_ids"

  def __init__(self, table):
    super().__init__(MarkovConfig())
    self.table = torch.nn.Parameter(torch.from_numpy(table.copy()))

  def forward(self, input_ids, **_):
    before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
    return CausalLMOutput(logits=self.table[before, input_ids])


def cases():
  """The settings of each case; all pairs of the first three."""
  kinds = itertools.product((False, True, "never"), (0, 2, 3), (0.8, -0.5, 2.0))
  for seed, (early_stopping, ngram, penalty) in enumerate(kinds):
    yield {
      "seed": seed,
      "beams": 2 + seed % 3,
      "early_stopping": early_stopping,
      "no_repeat_ngram": ngram,
      "length_penalty": penalty,
      "eos": list(EOS[: 1 + seed % 2]),
    }


def answers(case, prompt):
  model = Markov(random_table(case["seed"])).eval()
  out = model.generate(
    torch.tensor([prompt]),
    num_beams=case["beams"],
    num_return_sequences=case["beams"],
    early_stopping=case["early_stopping"],
    no_repeat_ngram_size=case["no_repeat_ngram"],
    length_penalty=case["length_penalty"],
    eos_token_id=case["eos"],
    pad_token_id=WORDS - 1,  # is not written into a text, see below
    max_new_tokens=NEW,
    do_sample=False,
    use_cache=False,
    output_scores=True,
    return_dict_in_generate=True,
  )
  # where a beam's index is -1 there is no token
  lengths = (out.beam_indices >= 0).sum(1).tolist()
  ids = out.sequences[:, len(prompt) :].tolist()
  scores = out.sequences_scores.tolist()
  return [
    [row[:length], score]
    for row, length, score in zip(ids, lengths, scores, strict=True)
  ]


if __name__ == "__main__":
  found = [
    {**case, "answers": [answers(case, prompt) for prompt in PROMPTS]}
    for case in list(cases())[::7]  # few, for each is compiled
  ]
  lines = ",\n".join("  " + json.dumps(case) for case in found)
  whole = f'{{"prompts": {json.dumps(PROMPTS)}, "new": {NEW}, "cases": [\n'
  FILE.write_text(whole + lines + "\n]}\n")
