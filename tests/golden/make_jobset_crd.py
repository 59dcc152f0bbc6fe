"""Makes jobset_crd.json: the schema that Kubernetes has of a JobSet.

  git clone --depth 1 --branch TAG https://github.com/kubernetes-sigs/jobset
  python -m tests.golden.make_jobset_crd \\
    jobset/config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml

The file is Apache-2.0, by The Kubernetes Authors; descriptions are left out.
jobset_crd.json is of commit b83a48ede93f (July 2026).
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def bare(tree: Any) -> Any:
  """Without the texts that describe a field."""
  if isinstance(tree, list):
    return [bare(value) for value in tree]
  if not isinstance(tree, dict):
    return tree
  return {
    key: bare(value)
    for key, value in tree.items()
    if not (key == "description" and isinstance(value, str))
  }


if __name__ == "__main__":
  schema = bare(yaml.safe_load(Path(sys.argv[1]).read_text()))
  out = Path(__file__).with_name("jobset_crd.json")
  out.write_text(json.dumps(schema, separators=(",", ":")) + "\n")
