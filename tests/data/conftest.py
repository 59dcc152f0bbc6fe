"""GLUE's nine tasks as tiny files in GLUE's own form, and a tiny tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vera_jax.data.tokens import Tokens

SIX = "\t".join(["genre", "file", "2012", "1", "none", "none"])
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1"
MNLI = "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2"
QUOTE = 'He said "it is'  # an odd quote, as many texts have

FILES = {
  "CoLA/train": f"gj04\t1\t\t{QUOTE}\nbc01\t0\t*\tThem are here",
  "CoLA/dev": "gj04\t1\t\tFine.\n",
  "CoLA/test": f"index\tsentence\n0\t{QUOTE}\n1\tOne.\n",
  "SST-2/train": f"sentence\tlabel\n{QUOTE} \t1\nbad \t0\n",
  "SST-2/dev": "sentence\tlabel\ngood \t1\n",
  "SST-2/test": "index\tsentence\n0\ta film\n",
  "MRPC/train": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
  f"1\t10\t20\t{QUOTE}\tsecond\n0\t11\t21\tthird\tfourth\n",
  "MRPC/dev": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
  "1\t10\t20\tfirst\tsecond\r\n",
  "MRPC/test": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
  "0\t10\t20\tfirst\tsecond\n",
  "QQP/train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
  f"7\t1\t2\t{QUOTE}\tWhy?\t1\n8\t3\t4\tWho?\tWhen?\t0\n",
  "QQP/dev": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
  "7\t1\t2\tWhat?\tWhy?\t1\n",
  "QQP/test": "id\tquestion1\tquestion2\n3\tWhat?\tWhy?\n",
  "STS-B/train": f"{STSB}\tsentence2\tscore\n0\t{SIX}\t{QUOTE}\tcat\t5.000\n"
  f"1\t{SIX}\tdog\tcat\t0.5\n",
  "STS-B/dev": f"{STSB}\tsentence2\tscore\n0\t{SIX}\tdog\tcat\t2.25\n",
  "STS-B/test": f"{STSB}\tsentence2\n0\t{SIX}\tdog\tcat\n",
  "MNLI/train": f"{MNLI}\tlabel1\tgold_label\n"
  f"0\t1\t2\tfiction\t{QUOTE}\tYes.\tneutral\tcontradiction\n"
  "1\t1\t2\tfiction\tA.\tB.\tneutral\tentailment\n",
  "MNLI/dev_matched": f"{MNLI}\tlabel1\tlabel2\tgold_label\n"
  "0\t1\t2\tfiction\tmatched\tB.\tneutral\tneutral\tneutral\n",
  "MNLI/dev_mismatched": f"{MNLI}\tlabel1\tlabel2\tgold_label\n"
  "0\t1\t2\tfiction\tmismatched\tB.\tneutral\tneutral\tentailment\n",
  "MNLI/test_matched": f"{MNLI}\n5\t1\t2\tfiction\tmatched\tB.\n",
  "MNLI/test_mismatched": f"{MNLI}\n6\t1\t2\tfiction\tmismatched\tB.\n",
  "QNLI/train": "index\tquestion\tsentence\tlabel\n"
  f"0\tWho?\t{QUOTE}\tnot_entailment\n1\tWho?\tHe.\tentailment\n",
  "QNLI/dev": "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n",
  "QNLI/test": "index\tquestion\tsentence\n0\tWho?\tHe.\n",
  "RTE/train": "index\tsentence1\tsentence2\tlabel\n"
  f"0\t{QUOTE}\tB.\tnot_entailment\n1\tA.\tB.\tentailment\n",
  "RTE/dev": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
  "RTE/test": "index\tsentence1\tsentence2\n0\tA.\tB.\n",
  "WNLI/train": f"index\tsentence1\tsentence2\tlabel\n0\t{QUOTE}\tB.\t1\n"
  "1\tA.\tB.\t0\n",
  "WNLI/dev": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n",
  "WNLI/test": "index\tsentence1\tsentence2\n0\tA.\tB.\n",
}


@pytest.fixture
def tiny_glue(tmp_path: Path) -> Path:
  """A folder with all nine tasks, one or two rows a file."""
  for name, text in FILES.items():
    path = tmp_path / f"{name}.tsv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode())
  return tmp_path


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
  """Words a to z as ids 4 to 29, in BERT's frame of special tokens."""
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  words = special + [chr(ord("a") + i) for i in range(26)]
  vocab = {word: id for id, word in enumerate(words)}
  backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.post_processor = processors.BertProcessing(
    ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token="[PAD]",
    unk_token="[UNK]",
    cls_token="[CLS]",
    sep_token="[SEP]",
    model_input_names=["input_ids", "token_type_ids", "attention_mask"],
  )


def random_tokens(
  seed: int, *, examples: int, longest: int, regression: bool = False
) -> Tokens:
  """Ragged random ids whose first id in each example is 2."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, longest + 1, examples)
  lengths[0] = longest
  ids = rng.integers(4, 100, lengths.sum()).astype(np.int32)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  ids[offsets[:-1]] = 2
  labels = rng.integers(0, 3, examples).astype(np.int32)
  return Tokens(
    ids=ids,
    offsets=offsets,
    token_types=rng.integers(0, 2, lengths.sum()).astype(np.int32),
    labels=labels.astype(np.float32) / 3 if regression else labels,
    index=np.arange(examples),
    truncated=0,
    pad_id=1,
    fingerprint="",
  )


@pytest.fixture
def make_tokens():
  return random_tokens
