"""Adapters of any linen model: saved, loaded, merged; what differs is named."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tests.adapters.conftest import Net, stacked
from tests.adapters.test_every_method import OTHERWISE, Ready
from tests.slow import rest_is_slow
from vera_jax import (
  UserError,
  adapt,
  chain,
  ia3,
  join,
  label_tree,
  load_adapter,
  lora,
  restore_adapter,
  split,
  unilora,
  vera,
)
from vera_jax.adapters.base_leaves import bitfit
from vera_jax.adapters.files import ABOUT, SHA256, TENSORS

TARGETS = ("heads", "out")


def equal(one, two):
  assert flatten_dict(one).keys() == flatten_dict(two).keys()
  jax.tree.map(np.testing.assert_array_equal, one, two)


def train(adapted, params, x):
  """(trainable, variables): adapter and head, moved at random."""
  variables = adapted.init_on({"params": params}, jax.random.key(3), x)
  labels = label_tree(variables["params"], adapted.adapter)
  trainable, frozen = split(variables["params"], labels)
  rng = np.random.default_rng(0)
  trainable = jax.tree.map(
    lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
    trainable,
  )
  return trainable, {**variables, "params": join(trainable, frozen)}


@pytest.mark.parametrize("name", rest_is_slow(OTHERWISE))
def test_every_method_in_either_layout(name, base, x, tmp_path):
  """Saved from looped layers, loaded onto looped and onto stacked ones."""
  looped = Ready(name, "looped", base, x, perturbed=True)
  variables = {"params": looped.params, "projections": looped.projections}
  trainable, _ = split(looped.params, label_tree(looped.params, looped.adapter))
  looped.module.save(tmp_path, trainable, variables)
  back = looped.module.load(tmp_path, {"params": looped.base}, x)
  equal(back["params"], looped.params)
  equal(back.get("projections", {}), looped.projections)
  scanned = looped.module.clone(model=Net("scanned"))
  back = scanned.load(tmp_path, {"params": stacked(looped.base)}, x)
  equal(back["params"], stacked(looped.params))


def test_stacked_layers_are_loaded_onto_looped_ones(base, x, tmp_path):
  scanned = adapt(Net("scanned"), vera(3, sharing="unique"), targets=TARGETS)
  trainable, variables = train(scanned, stacked(base), x)
  scanned.save(tmp_path, trainable, variables)
  looped = scanned.clone(model=Net("looped"))
  back = looped.load(tmp_path, {"params": base}, x)
  equal(stacked(back["params"]), variables["params"])


class Boxed(nn.Module):
  """Boxed kernels, running statistics, one layer named as a stack is."""

  @nn.compact
  def __call__(self, x, *, double=False):
    first = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    x = nn.Dense(4, kernel_init=first, name="layer")(x)
    x = nn.BatchNorm(use_running_average=True, name="norm")(x)
    scale = self.param("scale", nn.initializers.ones, ())
    x = nn.Dense(3, kernel_init=first, name="classifier")(x * scale)
    return 2 * x if double else x


def test_boxes_other_collections_and_keywords(x, tmp_path):
  model = Boxed()
  pretrained = model.init(jax.random.key(0), x)
  adapted = adapt(model, lora(2), targets=["layer"])
  variables = adapted.init_on(pretrained, jax.random.key(1), x, double=True)
  labels = label_tree(
    variables["params"], adapted.adapter, head="classifier/.*|scale"
  )
  trainable, frozen = split(variables["params"], labels)
  trainable = jax.tree.map(lambda leaf: leaf + 1, trainable)
  adapted.save(tmp_path, trainable, variables)
  back = adapted.load(tmp_path, pretrained, x, double=True)
  expected = {**variables, "params": join(trainable, frozen)}
  assert jax.tree.structure(back) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, back, expected)
  merged = adapted.merge(back, x)
  assert merged.keys() == {"params", "batch_stats"}
  np.testing.assert_allclose(
    model.apply(merged, x), adapted.apply(back, x), rtol=0, atol=1e-5
  )
  # a head that the pretrained model lacks is in the file
  headless = dict(pretrained["params"])
  del headless["classifier"]
  again = adapted.load(tmp_path, {**pretrained, "params": headless}, x)
  equal(again["params"]["classifier"], trainable["classifier"])
  del headless["norm"]
  with pytest.raises(UserError, match="Neither .* have norm/bias, norm/scale"):
    adapted.load(tmp_path, {**pretrained, "params": headless}, x)


ADAPTED = adapt(Net(), vera(3), targets=TARGETS)


@pytest.fixture(scope="module")
def trained(base, x):
  return train(ADAPTED, base, x)


@pytest.fixture
def folder(trained, tmp_path):
  ADAPTED.save(tmp_path / "adapter", *trained, about={"task": "rare birds"})
  return tmp_path / "adapter"


def test_what_the_folder_says(folder, trained):
  about = load_adapter(folder).about
  assert about["method"] == "vera" and about["task"] == "rare birds"
  assert about["settings"]["rank"] == 3
  assert about["settings"]["targets"] == list(TARGETS)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(trained[0]))
  counts = about["parameters"]
  assert counts["adapter"] + counts["head"] == numbers
  assert counts["head"] == 8 * 3 + 3 and counts["adapter"] == 4 * (3 + 8)
  card = (folder / "README.md").read_text()
  assert "# vera adapter for rare birds" in card and "adapted.load(" in card
  assert "None" not in card


def change(folder, **fields):
  file = folder / ABOUT
  about = json.loads(file.read_text())
  settings = {**about["settings"], **fields.pop("settings", {})}
  file.write_text(json.dumps({**about, "settings": settings, **fields}))


def store(folder, *, without="", **tensors):
  """Other tensors, with the checksum of a file that was written so."""
  kept = {
    name: value
    for name, value in load_file(folder / TENSORS).items()
    if name != without
  }
  save_file({**kept, **tensors}, folder / TENSORS)
  about = json.loads((folder / ABOUT).read_text())
  del about[SHA256]
  (folder / ABOUT).write_text(json.dumps(about))


def cut(folder, *, file=TENSORS, edit=lambda data: data[:-7]):
  (folder / file).write_bytes(edit((folder / file).read_bytes()))


D = "layer.0-1.heads.vera_d"
HARM = {
  "no adapter.json": (lambda f: (f / ABOUT).unlink(), "There is no .*json"),
  "no tensors": (lambda f: (f / TENSORS).unlink(), "There is no .*tensors"),
  "half of the JSON": (lambda f: cut(f, file=ABOUT), "can't be read as JSON"),
  "half of the tensors": (cut, "checksum differs"),
  "one bit": (
    lambda f: cut(f, edit=lambda x: x[:-1] + bytes([x[-1] ^ 1])),
    "checksum differs",
  ),
  "another format": (lambda f: change(f, format=1), "has format 1"),
  "another method": (
    lambda f: change(f, method="lora"),
    "give adapt the same:\n  method: 'lora' in the file, 'vera' here",
  ),
  "another rank": (
    lambda f: change(f, settings={"rank": 4}),
    "same:\n  settings.rank: 4 in the file, 3 here$",
  ),
  "other targets": (
    lambda f: change(f, settings={"targets": ["out"]}),
    r"settings.targets: \['out'\] in the file, \['heads', 'out'\] here",
  ),
  "parts of fused kernels": (
    lambda f: change(f, fused={"fused": {"key": [0, 8]}}),
    r"fused.fused.key: \[0, 8\] in the file, None here",
  ),
  "another digest": (
    lambda f: change(f, projection_digest="0" * 64),
    "come out different .* not 000000000000",
  ),
  "another generator": (
    lambda f: change(f, projection_prng="rbg"),
    "generator 'rbg'",
  ),
  "another base's fingerprint": (
    lambda f: change(f, base_fingerprint="0" * 64),
    "trained on other weights .* not 000000000000",
  ),
  "a leaf that lacks": (
    lambda f: store(f, without=D),
    r"no layer.0.heads.vera_d, layer.1.heads.vera_d in the file",
  ),
  "a leaf too much": (
    lambda f: store(f, **{"layer.5.heads.vera_d": np.zeros(3, np.float32)}),
    "no place for layer.5.heads.vera_d",
  ),
  "another shape": (
    lambda f: store(f, **{D: np.zeros((2, 4), np.float32)}),
    r"vera_d has shape \(4,\), not \(3,\)",
  ),
  "no numbers": (
    lambda f: store(f, **{D: np.full((2, 3), np.nan, np.float32)}),
    "vera_d holds values that are not finite",
  ),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_named(harm, folder, base, x):
  edit, words = HARM[harm]
  edit(folder)
  with pytest.raises(UserError, match=f"(?s){words}"):
    ADAPTED.load(folder, {"params": base}, x)


def test_another_base_is_refused(folder, base, x):
  """A frozen leaf that differs in its last bit, or in its type."""
  norm = base["norm"]["scale"]
  for scale in (norm.at[0].set(jnp.nextafter(norm[0], 9.0)), norm.astype("f2")):
    other = {**base, "norm": {**base["norm"], "scale": scale}}
    with pytest.raises(UserError, match="on other weights .* same type"):
      ADAPTED.load(folder, {"params": other}, x)
  # what was trained is the file's, whatever the base has there
  head = jax.tree.map(jnp.zeros_like, base["classifier"])
  ADAPTED.load(folder, {"params": {**base, "classifier": head}}, x)


def test_neither_reader_takes_the_others_file(folder, random_adapter, base, x):
  with pytest.raises(UserError, match="names no base: .* `load` of that model"):
    restore_adapter(load_adapter(folder))
  with pytest.raises(UserError, match="belongs to the base .*restore_adapter"):
    ADAPTED.load(random_adapter(), {"params": base}, x)


MISUSE = {
  "the model's own variables": (
    lambda trainable, variables, base: (trainable, {"params": base}),
    "have no leaves of vera, or no projections: give those that init",
  ),
  "no projections": (
    lambda trainable, variables, base: (
      trainable,
      {"params": variables["params"]},
    ),
    "no projections: give those that init",
  ),
  "the head alone": (
    lambda trainable, variables, base: (
      {"classifier": trainable["classifier"]},
      variables,
    ),
    "lack layer_0/heads/vera_b, .* and 5 more, which vera trains",
  ),
  "a leaf of another model": (
    lambda trainable, variables, base: (
      {**trainable, "extra": {"kernel": jnp.ones((2, 2))}},
      variables,
    ),
    r"no extra/kernel of shape \(2, 2\)",
  ),
  "half precision": (
    lambda trainable, variables, base: (
      jax.tree.map(lambda leaf: leaf.astype("bfloat16"), trainable),
      variables,
    ),
    "is trained in bfloat16, but an adapter's file holds float32",
  ),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_wrong_trees_are_refused(misuse, trained, base, tmp_path):
  wrong, words = MISUSE[misuse]
  with pytest.raises(UserError, match=words):
    ADAPTED.save(tmp_path / "new", *wrong(*trained, base))
  assert not (tmp_path / "new").exists()


def test_what_is_computed_can_not_be_told(trained, tmp_path):
  with pytest.raises(UserError, match="base, method can't be given"):
    ADAPTED.save(tmp_path, *trained, about={"method": "lora", "base": "x"})


def test_a_chain_keeps_each_methods_targets(base, x, tmp_path):
  both = chain(vera(3)._replace(on=["heads"]), ia3(feedforward=["out"]))
  adapted = adapt(Net(), chain(both, bitfit()), targets=TARGETS)
  trainable, variables = train(adapted, base, x)
  adapted.save(tmp_path, trainable, variables)
  about = load_adapter(tmp_path).about
  assert about["method"] == "vera+ia3+bitfit"
  groups = about["settings"]
  assert groups["vera"]["targets"] == ["heads"]
  assert groups["ia3"] == {"feedforward": ["out"], "targets": list(TARGETS)}
  back = adapted.load(tmp_path, {"params": base}, x)
  equal(back["params"], variables["params"])


def test_the_summary(x):
  """Sites, what else is trained, and what all layers share."""
  assert ADAPTED.summary(x).splitlines() == [
    "layer          kind          kernel  plan      trained numbers",
    "-------------  ------------  ------  --------  ---------------",
    "layer_0/heads  DenseGeneral  8 × 8   factored               11",
    "layer_0/out    DenseGeneral  8 × 8   factored               11",
    "layer_1/heads  DenseGeneral  8 × 8   factored               11",
    "layer_1/out    DenseGeneral  8 × 8   factored               11",
    "vera trains 44 numbers, 5.53% of the model's 795, on 4 layers:"
    " 4 DenseGeneral.",
  ]
  both = chain(unilora(2, size=20), bitfit())
  lines = adapt(Net("scanned"), both, targets=["out"]).summary(x).splitlines()
  names = ["layer/out", "(of", "classifier", "first", "layer/fused"]
  names += ["layer/heads", "norm", "unilora+bitfit"]
  assert [line.split()[0] for line in lines[2:]] == names
  assert "2 × 8 × 8" in lines[2] and lines[2].endswith(" 0")
  assert lines[3].endswith(" 20")
