"""A run's own adapter folder, put back on its base."""

from vera_jax.adapters.files import load_adapter
from vera_jax.models.classifier import restore_adapter
from vera_jax.serve.predictor import Predictor
from vera_jax.tasks.glue_data import load_split
from vera_jax.tasks.metrics import accuracy


def test_it_answers_as_the_run_did(finished):
  """The dev score of the best epoch, from the adapter's two files."""
  classifier = restore_adapter(load_adapter(finished.folder / "adapter"))
  dev = load_split(classifier.task, finished.config.data.source, "validation")
  logits = Predictor(classifier).logits(dev.first, dev.second)
  found = accuracy(logits.argmax(-1), dev.labels)
  assert found == finished.result["best"]["score"]
  assert classifier.about["max_length"] == finished.config.data.max_length
