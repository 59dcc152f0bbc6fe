"""A base's linear layers by the shortest names that mean them alone."""

from vera_jax.models.paper_sizes import roberta
from vera_jax.peft_io.base import linear_layers, module_list, target_patterns
from vera_jax.pretrained.blueprint import blueprint


def test_the_shortest_names_for_layers():
  fields = roberta(64, 2) | {"model_type": "bert"}
  layers = linear_layers(blueprint(fields, outputs=2, scan=False))
  assert list(layers)[-1] == "classifier"
  kinds = {layer.kind for name, layer in layers.items() if "dense" in name}
  assert target_patterns(kinds, layers) == [
    "attention/output/dense",
    "intermediate/dense",
    r"layer(_\d+)?/output/dense",
    "pooler/dense",
  ]
  outer = [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
  inner = [name for name in layers if "attention.output" in name]
  assert module_list(outer, layers) == outer
  assert module_list(inner, layers) == ["attention.output.dense"]
  assert module_list(inner[:1], layers) == inner[:1]
