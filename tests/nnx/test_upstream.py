"""What docs/upstream.md reports is so in the installed libraries."""

import os

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText without Google Cloud's

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import jax
import pytest

PAGE = Path(__file__).parents[2] / "docs/upstream.md"
EXAMPLES = re.findall(
  r"### (.+?)\n.*?```python\n(.*?)```\n\n```text\n(.*?)```",
  PAGE.read_text(),
  flags=re.DOTALL,
)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),  # of the libraries' dependencies
]


@pytest.mark.parametrize(
  ("title", "code", "printed"), EXAMPLES, ids=[x[0] for x in EXAMPLES]
)
def test_an_example_prints_what_the_page_says(title, code, printed):
  pytest.importorskip(title.partition(":")[0].lower())
  output = io.StringIO()
  with redirect_stdout(output), jax.numpy_rank_promotion("allow"):
    exec(code, {})
  assert output.getvalue().endswith(printed)  # MaxText says more at first
