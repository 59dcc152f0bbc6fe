"""A batch of several adapters is each adapter alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from vera_jax.adapter_files import SavedAdapter, load_adapter
from vera_jax.apply import adapt
from vera_jax.bank import AdapterBank, _set_slot
from vera_jax.classifier import restore_adapter
from vera_jax.data.examples import Examples
from vera_jax.data.mixed import pack_mixed, place_mixed
from vera_jax.data.packing import Layout, pack
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.data.tokens import tokenise
from vera_jax.errors import UserError
from vera_jax.labels import ADAPTER, label_tree, split
from vera_jax.mixed import (
  empty_stack,
  mixed_logits,
  mixed_losses,
  mixed_state,
  mixed_step,
)
from vera_jax.models.bert import INPUTS, BertClassifier, BertConfig
from vera_jax.prediction import Predictor
from vera_jax.train.step import Frozen, State, forward, mean_loss, train_step
from vera_jax.vera import vera

RNG = np.random.default_rng(0)
TEXTS = [
  " ".join(RNG.choice([f"word{i}" for i in range(25)], 1 + i % 12))
  for i in range(60)
]
NAMES = ("one", "two", "three")
NAMED = [NAMES[i * i % 3] for i in range(len(TEXTS))]  # one, two; never three


def another(saved, seed, **about):
  """The same kind of adapter with other numbers."""
  rng = np.random.default_rng(seed)
  tensors = {
    name: value
    if name.startswith("projections")
    else (value + 0.2 * rng.standard_normal(value.shape)).astype(np.float32)
    for name, value in saved.tensors.items()
  }
  return SavedAdapter({**saved.about, **about}, tensors, saved.folder)


def three(folder):
  first = load_adapter(folder)
  return dict(zip(NAMES, (another(first, i) for i in range(3)), strict=True))


COMPILED: dict[str, Predictor] = {}  # one program for all of a kind


def alone(saved, *texts, **options):
  classifier = restore_adapter(saved)
  kind = f"{saved.about['base']} {saved.about['settings']}"
  predictor = COMPILED.setdefault(kind, Predictor(classifier))
  predictor.classifier = classifier
  predictor.max_length = options.get("max_length", classifier.max_length)
  return predictor.logits(*texts)


@pytest.fixture(scope="module")
def adapters(random_adapter):
  return three(random_adapter(task="sst2"))


@pytest.fixture(scope="module")
def expected(adapters):
  """Each adapter's own answers to the texts."""
  return {name: alone(saved, TEXTS) for name, saved in adapters.items()}


@pytest.fixture
def bank(adapters):
  return AdapterBank(adapters, capacity=5)


def chosen(logits, named=NAMED):
  return np.stack([logits[name][i] for i, name in enumerate(named)])


@pytest.mark.parametrize(
  "method, settings",
  [
    ("vera", {}),
    ("vera", {"sharing": "unique", "train": "b"}),
    ("lora", {}),
    ("bitfit", {}),
  ],
)
def test_mixed_is_each_alone(method, settings, random_adapter):
  saved = three(random_adapter(method, task="sst2", **settings))
  bank = AdapterBank(saved)
  mixed = bank.logits(TEXTS, adapters=NAMED)
  own = {name: alone(saved[name], TEXTS) for name in NAMES}
  np.testing.assert_allclose(mixed, chosen(own), rtol=0, atol=2e-5)
  for one, two in (NAMES[:2], NAMES[1:]):
    assert np.abs(own[one] - own[two]).max() > 0.05  # the adapters differ


def test_pairs_on_roberta_whose_head_is_deep(tiny_roberta, random_adapter):
  saved = three(random_adapter(task="rte", base=tiny_roberta))
  bank = AdapterBank(saved, capacity=7)
  texts = TEXTS[:20], TEXTS[20:40]
  mixed = bank.logits(*texts, adapters=NAMED[:20])
  for name in set(NAMED):
    mine = [i for i in range(20) if NAMED[i] == name]
    want = alone(saved[name], *texts)[mine]
    np.testing.assert_allclose(mixed[mine], want, rtol=0, atol=2e-5)


def test_one_name_for_all_and_answers_in_its_labels(adapters, expected):
  grammar = another(
    adapters["two"], 9, task="cola", labels=["unacceptable", "acceptable"]
  )
  bank = AdapterBank({"films": adapters["one"], "grammar": grammar})
  logits = bank.logits(TEXTS, adapters="films")
  np.testing.assert_allclose(logits, expected["one"], rtol=0, atol=2e-5)
  names = ["films", "grammar"] * (len(TEXTS) // 2)
  film, sentence, *_ = bank.answers(TEXTS, adapters=names)
  assert film.label in ("negative", "positive")
  assert sentence.label in ("unacceptable", "acceptable")


def test_each_text_is_cut_as_its_adapters_training_did(adapters):
  short = another(adapters["two"], 9, max_length=6)
  bank = AdapterBank({"long": adapters["one"], "short": short})
  texts = [TEXTS[11], TEXTS[11]]  # twelve words
  mixed = bank.logits(texts, adapters=["short", "long"])
  want = alone(short, texts)[0], alone(adapters["one"], texts)[1]
  np.testing.assert_allclose(mixed, want, rtol=0, atol=2e-5)
  assert bank.truncated == 1
  same = AdapterBank({"a": adapters["one"], "b": short}, max_length=6)
  cut = same.logits(texts, adapters=["a", "b"])
  want = alone(adapters["one"], texts, max_length=6)[0], mixed[0]
  np.testing.assert_allclose(cut, want, rtol=0, atol=2e-5)


def test_add_replace_and_remove_compile_nothing(bank, adapters):
  before = bank.logits(TEXTS, adapters=NAMED)
  bank.replace("three", adapters["three"])
  compiled = bank._run._cache_size(), _set_slot._cache_size()
  new = another(adapters["one"], 17)
  bank.add("four", new)
  bank.replace("three", new)
  bank.remove("two")
  bank.add("five", adapters["two"])
  assert len(bank) == 4 and "two" not in bank and "five" in bank
  assert list(bank) == ["one", "three", "four", "five"]
  named = [{"two": "five"}.get(name, name) for name in NAMED]
  after = bank.logits(TEXTS, adapters=named)
  np.testing.assert_array_equal(before, after)
  want = alone(new, TEXTS)
  for name in ("three", "four"):
    logits = bank.logits(TEXTS, adapters=name)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)
  assert (bank._run._cache_size(), _set_slot._cache_size()) == compiled
  with pytest.raises(UserError, match="no adapter 'two'. It has: one, three"):
    bank.logits(TEXTS, adapters=NAMED)


def test_a_slot_is_written_in_place(bank, adapters):
  old = jax.tree.leaves(bank.params)
  places = [leaf.unsafe_buffer_pointer() for leaf in old]
  bank.replace("two", adapters["three"])
  new = jax.tree.leaves(bank.params)
  assert all(leaf.is_deleted() for leaf in old)
  assert [leaf.unsafe_buffer_pointer() for leaf in new] == places


def test_a_full_bank_and_a_taken_name(adapters):
  bank = AdapterBank(adapters)
  with pytest.raises(UserError, match="capacity is 3(.|\n)*larger"):
    bank.add("four", adapters["one"])
  with pytest.raises(UserError, match="'one': replace"):
    bank.add("one", adapters["two"])
  with pytest.raises(UserError, match="no room for 3"):
    AdapterBank(adapters, capacity=2)
  with pytest.raises(UserError, match="none was given"):
    AdapterBank({})
  with pytest.raises(UserError, match="2 texts and 1 names"):
    bank.logits(TEXTS[:2], adapters=["one"])


@pytest.mark.parametrize(
  "method, settings, words",
  [
    ("vera", {"rank": 4}, "rank: 4 there, 8 in the bank"),
    ("vera", {"projection_seed": 1}, r"projections \(digest\): \w+ there"),
    ("vera", {"train": "d"}, "train: d there, both in the bank"),
    ("vera", {"targets": ["query"]}, r"no encoder.*value\.vera_"),
    ("vera", {"task": "mnli"}, "number of labels: 3 there, 2 in the bank"),
    ("vera", {"task": "stsb"}, "number of labels: 0 there"),
    ("lora", {}, "method: lora there, vera in the bank"),
  ],
)
def test_what_does_not_fit_is_named(
  bank, method, settings, words, random_adapter
):
  other = random_adapter(method, **{"task": "sst2", **settings})
  before = jax.tree.map(np.array, bank.params)
  for put in (bank.add, bank.replace):
    name = "four" if put == bank.add else "two"
    with pytest.raises(UserError, match=f"'{name}' (.|\n)*{words}"):
      put(name, other)
  assert list(bank) == list(NAMES)
  jax.tree.map(np.testing.assert_array_equal, bank.params, before)
  bank.add("four", load_adapter(random_adapter(task="sst2")))  # a slot is left


def test_another_base_or_alpha_is_named(bank, adapters, random_adapter):
  other = another(adapters["one"], 1, base_fingerprint="0" * 64)
  with pytest.raises(UserError, match=r"base \(fingerprint\): 0{12} there"):
    bank.add("four", other)
  saved = load_adapter(random_adapter("lora", task="sst2"))
  louder = random_adapter("lora", task="sst2", alpha=8.0)
  with pytest.raises(UserError, match="alpha: 8.0 there, 4.0 in the bank"):
    AdapterBank({"a": saved, "b": louder})
  with pytest.raises(UserError, match="method full"):
    AdapterBank({"all": random_adapter("full", task="sst2")})


def test_where_an_adapter_started_is_no_difference(bank, adapters):
  settings = {**adapters["one"].about["settings"], "d_init": 1e-7}
  bank.add("four", another(adapters["one"], 3, settings=settings))


def test_a_stored_pair_fits_by_its_own_digest(adapters):
  pair = restore_adapter(adapters["one"]).projections
  settings = {**adapters["one"].about["settings"], "init": "stored"}

  def stored(pair):
    tensors = {f"projections.{k}": np.asarray(pair[k]) for k in "AB"}
    saved = another(adapters["two"], 3, settings=settings)
    return saved._replace(tensors=saved.tensors | tensors)

  bank = AdapterBank(adapters, capacity=4)
  bank.add("four", stored(pair))
  want = alone(stored(pair), TEXTS)
  mixed = bank.logits(TEXTS, adapters="four")
  np.testing.assert_allclose(mixed, want, rtol=0, atol=2e-5)
  with pytest.raises(UserError, match="digest"):
    bank.replace("four", stored({k: 2 * x for k, x in pair.items()}))


@pytest.mark.parametrize("init", ["kaiming_uniform", "stored"])
def test_what_is_saved_comes_back(init, adapters, tmp_path):
  saved = adapters["one"]
  if init == "stored":
    pair = restore_adapter(saved).projections
    settings = {**saved.about["settings"], "init": "stored"}
    tensors = {f"projections.{k}": np.asarray(pair[k]) for k in "AB"}
    saved = SavedAdapter(
      {**saved.about, "settings": settings},
      saved.tensors | tensors,
      saved.folder,
    )
  bank = AdapterBank({"one": saved}, capacity=2)
  bank.save("one", tmp_path / "again")
  again = load_adapter(tmp_path / "again")
  assert again.tensors.keys() == saved.tensors.keys()
  for name, value in saved.tensors.items():
    np.testing.assert_array_equal(again.tensors[name], value)
  restore_adapter(again)


# What a pass makes and what it costs


def made_shapes(jaxpr):
  """Shapes of all that a program makes, inner programs' too."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
    for inner in jaxprs_in_params(eqn.params):
      yield from made_shapes(inner)


def batch_of(rows=5, length=24, slots=3):
  wide = {name: np.ones((rows, length), np.int32) for name in INPUTS}
  slotted = {"cls_positions": np.zeros((rows, slots), np.int32)}
  return {**wide, **slotted, "adapter": np.arange(rows, dtype=np.int32) % 3}


def variables_of(model):
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), ids)


def kernels_by_row(method, scan):
  """Shapes with an axis of rows and a kernel's, A's or B's two axes."""
  config = BertConfig("bert", 30, 16, 2, 2, 32, 40, 0)
  targets = ["query", "value", "intermediate/dense"]
  model = adapt(BertClassifier(config, 2, scan=scan), vera(8), targets=targets)
  variables = variables_of(model)
  params, pair = variables["params"], variables["projections"]
  trained, base = split(params, label_tree(params, method))
  stacked = jax.eval_shape(partial(empty_stack, capacity=4), trained)
  run = partial(mixed_logits, apply=model.apply)
  batch = batch_of(rows=5, length=24)
  jaxpr = jax.make_jaxpr(run)(stacked, Frozen(base, pair), batch).jaxpr
  matrices = {(8, 16), (32, 8), (16, 16), (16, 32), (32, 16)}
  matrices |= {shape[::-1] for shape in matrices}
  return [
    shape
    for shape in made_shapes(jaxpr)
    if 5 in shape[:-2] and shape[-2:] in matrices
  ]


@pytest.mark.parametrize("scan", [True, False])
def test_no_kernel_gets_an_axis_of_rows(scan):
  """Neither the base's nor A or B; and no product of them for each row."""
  assert kernels_by_row("vera", scan) == []
  assert kernels_by_row("full", scan)  # here each row has its kernels


def test_ten_thousand_adapters_of_roberta_base():
  """24 layers x (1024 + 768) numbers x 4 bytes each, and the heads apart."""
  config = BertConfig("roberta", 50265, 768, 12, 12, 3072, 514, 1)
  targets = ["query", "value"]
  model = adapt(BertClassifier(config, 2), vera(1024), targets=targets)
  params = variables_of(model)["params"]
  labels = label_tree(params, "vera")
  stacked = jax.eval_shape(
    partial(empty_stack, capacity=10_000), split(params, labels)[0]
  )
  labels = flatten_dict(labels)
  adapters = sum(
    leaf.size * leaf.dtype.itemsize
    for path, leaf in flatten_dict(stacked).items()
    if labels[path] == ADAPTER
  )
  assert adapters == 10_000 * 172_032


# Training


LABELS = np.arange(len(TEXTS), dtype=np.int32) % 2
KEY = jax.random.key(3)
TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.02))
LAYOUT = Layout((12,), 32, 8)  # one shape, alone and mixed
STEPS = 3
BATCHES = [np.arange(12) + 12 * step for step in range(STEPS)]
# "three" has no example in the second step, and "four" has none at all
NAMED_BY = ["one", "two", "three"] * 4 + ["one", "two", "two"] * 4 + NAMED
NAMED_BY = NAMED_BY[: len(TEXTS)]


@pytest.fixture(scope="module")
def tokens(tiny_model):
  examples = Examples(TEXTS, None, LABELS, np.arange(len(TEXTS)))
  return tokenise(examples, load_tokenizer(tiny_model), 16, None)


def without_dropout(apply):
  def run(*args, deterministic, rngs, **kwargs):
    del deterministic, rngs
    return apply(*args, deterministic=True, **kwargs)

  return run


def on_device(batch):
  return jax.tree.map(jnp.asarray, batch)


def own_batches(tokens, name):
  """An adapter's own examples of each batch, packed as ever."""
  for indices in BATCHES:
    mine = [i for i in indices if NAMED_BY[i] == name]
    if mine:
      yield on_device(pack(tokens, np.array(mine), LAYOUT))


def mixed_batches(bank, tokens):
  slots = bank.slots(NAMED_BY)
  for indices in BATCHES:
    yield on_device(pack_mixed(tokens, indices, slots, LAYOUT))


def test_gradients_of_the_means_are_each_alone(bank, tokens):
  """Of one batch; the loss is each adapter's mean, the objective their sum."""
  apply = without_dropout(bank.apply)
  (batch, *_), names = mixed_batches(bank, tokens), NAMES

  @jax.jit
  def mixed(params):
    losses = mixed_losses(params, bank.frozen, batch, KEY, apply=apply)
    return losses.sum(), losses

  @jax.jit
  def single(params, batch):
    logits = forward(
      apply, params, bank.frozen, batch, deterministic=True, rngs=None
    )
    return mean_loss(logits, batch["labels"], batch["example"])

  grads, losses = jax.grad(mixed, has_aux=True)(bank.params)
  value_and_grad = jax.jit(jax.value_and_grad(single))
  for name in names:
    slot = bank.slots([name])[0]
    params = jax.tree.map(lambda leaf, slot=slot: leaf[slot], bank.params)
    loss, grad = value_and_grad(params, next(own_batches(tokens, name)))
    np.testing.assert_allclose(losses[slot], loss, rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.tree.map(lambda g, s=slot: g[s], grads), grad)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(grad)) > 0.01
  free = bank.slots(["one"])[0] + 3  # a slot without an adapter
  assert losses[free] == 0
  assert all(not g[free].any() for g in jax.tree.leaves(grads))


def test_steps_are_those_of_each_alone(bank, tokens, adapters):
  """Clipping, decay and moments too; who has no example is left alone."""
  bank.add("four", adapters["one"])
  apply = without_dropout(bank.apply)
  start = jax.tree.map(np.array, bank.params)
  state = mixed_state(bank.params, TX)
  step = jax.jit(partial(mixed_step, apply=apply, tx=TX), donate_argnums=0)
  losses = []
  for batch in mixed_batches(bank, tokens):
    state, metrics = step(state, bank.frozen, batch, KEY)
    losses.append(np.asarray(metrics["loss"]))
  bank.params = state.params
  run = jax.jit(partial(train_step, apply=apply, tx=TX))
  for name in NAMES:
    slot = bank.slots([name])[0]
    own = jax.tree.map(lambda leaf, slot=slot: leaf[slot], start)
    state = State(jnp.int32(0), own, TX.init(own))
    single = []
    for batch in own_batches(tokens, name):
      state, metrics = run(state, bank.frozen, batch, KEY)
      single.append(metrics["loss"])
    mixed = [loss[slot] for loss in losses if not np.isnan(loss[slot])]
    np.testing.assert_allclose(mixed, single, rtol=1e-4)
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    found = jax.tree.map(lambda leaf, slot=slot: leaf[slot], bank.params)
    jax.tree.map(close, found, state.params)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found, own)
    assert min(jax.tree.leaves(moved)) > 0.01
  slot = bank.slots(["four"])[0]
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[slot], b[slot]),
    bank.params,
    start,
  )
  assert np.isnan([loss[slot] for loss in losses]).all()


def test_rows_draw_their_own_dropout(bank):
  """Three rows of one text and one adapter."""
  batch = batch_of(rows=3, length=8, slots=1)
  batch["adapter"][:] = bank.slots(["one"])
  run = jax.jit(partial(mixed_logits, apply=bank.apply))
  same = np.asarray(run(bank.params, bank.frozen, batch))
  np.testing.assert_allclose(same, same[:1].repeat(3, 0), rtol=0, atol=1e-6)
  drawn = np.asarray(run(bank.params, bank.frozen, batch, KEY))
  assert len(np.unique(drawn.round(4), axis=0)) == 3


# Rows


def test_no_row_holds_texts_of_two_adapters(tokens):
  slots = np.arange(len(TEXTS)) * 7 % 5
  place = place_mixed(tokens.lengths, slots, LAYOUT)
  for row in range(place.rows):
    here = place.row == row
    assert len(set(slots[here])) == 1
    assert tokens.lengths[here].sum() <= LAYOUT.length
    assert sorted(place.slot[here]) == list(range(here.sum()))
  batch = pack_mixed(tokens, np.arange(30, 50), slots, Layout((20,), 32, 8))
  assert set(batch["example"][batch["example"] >= 0]) == set(range(30, 50))
  for adapter, examples in zip(batch["adapter"], batch["example"], strict=True):
    real = examples[examples >= 0]
    assert (slots[real] == adapter).all() if len(real) else adapter == -1
  with pytest.raises(ValueError, match="rows are needed"):
    pack_mixed(tokens, np.arange(30), slots, Layout((2,), 32, 8))
