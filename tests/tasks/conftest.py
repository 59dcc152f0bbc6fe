"""GLUE's nine tasks as tiny files in GLUE's own form."""

from pathlib import Path

import pytest

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
