"""What commands answer to --help and to what users mistype, in one process."""

import pytest

from tests.experiments import command

RTE = "--config=configs/rte.py"
RANK = "--config=configs/sweeps/rank.py:minilm"
LACKING = ["--config=configs/common.py", "--config.task=rte"]
LACKING += ["--config.vera.lr=1"]
MISTAKES = [
  ("glue", 1, [], "--config=rte"),
  ("glue", 2, [RTE, "--config.vera.rnak=3"], "d_init, head_lr, init, lr"),
  ("glue", 2, [RTE, "--config.vera.rank=many"], "--config.vera.rank=many"),
  ("glue", 2, [RTE, "--work=here"], "Unknown command line flag 'work'"),
  ("glue", 2, [RTE, "leftover"], "leftover"),
  ("glue", 2, ["--config=configs/nope.py"], "no file configs/nope.py"),
  ("glue", 2, ["--config=superglue/bolq"], "superglue/boolq"),
  ("glue", 2, ["--config=configs/rte.py:huge"], "only base, large"),
  ("glue", 1, ["--config=configs/common.py"], "config.task, config.optim.epo"),
  ("glue", 1, LACKING, "config.optim.epochs, config.vera.head_lr"),
  ("glue", 1, [RTE, "--config.optim.batch_size=0"], "batch_size is 0"),
  ("glue", 1, [RTE, "--seeds=0,one"], "--seeds=0,one: give whole numbers"),
  ("glue", 1, [RTE, "--profile=9"], "the first and the last step to trace"),
  ("glue", 1, [RTE, "--seeds=3,4,3"], "Two runs of the ensemble are the same"),
  ("sweep", 1, [RTE, "--workdir=x"], "vera-jax train"),
  ("sweep", 1, [RANK], "--workdir=DIR"),
  ("sweep", 1, [RANK, "--workdir=x", "--shard=4/4"], "from 0 to n - 1"),
  ("merge", 1, ["--adapter=nowhere"], "--adapter=DIR --out=DIR"),
  ("merge", 1, ["--adapter=nowhere", "--out=new"], "no adapter folder nowhere"),
  ("merge", 1, ["--adapter=nowhere", "--out=."], ". is there already"),
  ("predict", 1, ["--adapter=a", "--model=b", "--input=-"], "either --adapter"),
  ("predict", 1, ["--adapter=a", "--input=no.tsv"], "There is no no.tsv"),
  ("predict", 1, ["--adapter=a", "--input=x.xlsx"], ".xlsx files are not"),
]


@pytest.fixture(scope="module")
def answers():
  """What is printed for --help, and for each mistake."""
  asked = [("glue", 0, ["--help"], ""), *MISTAKES]
  return command.run_each(
    *([f"experiments.{script}", *flags] for script, _, flags, _ in asked)
  )


def test_help_is_ours(answers):
  done = answers[0]
  assert done.returncode == 0 and not done.stderr
  assert done.stdout.startswith("Fine-tune on a GLUE task")
  settings = "--config.lora.rank=8  r\n", "takes the settings of vera\n"
  flags = "--config", "--workdir", "--seeds", "config.model.name"
  for word in (*flags, *settings):
    assert word in done.stdout
  for word in ("--verbosity", "--pdb", "--log_dir"):
    assert word not in done.stdout


def test_a_mistake_is_explained_in_a_line_or_two(answers):
  for (_, code, _, words), done in zip(MISTAKES, answers[1:], strict=True):
    assert done.returncode == code, done
    assert words in done.stderr
    assert len(done.stderr.splitlines()) <= 3
  (lacking,) = [d for d in answers if d.args[1:] == LACKING]
  assert "config.task" not in lacking.stderr
