"""A batch of several adapters is each adapter alone."""

import jax
import numpy as np
import pytest

from tests.random_adapter import SETTINGS
from tests.slow import rest_is_slow
from vera_jax.adapters.files import SavedAdapter, load_adapter
from vera_jax.adapters.projections import digest
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import restore_adapter
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.predictor import Predictor

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


COMPILED: dict[str, Predictor] = {}  # one program for adapters of a kind


def alone(saved, *texts, **options):
  classifier = restore_adapter(saved)
  about = saved.about
  kind = f"{about['base']} {about['settings']} {len(about['labels'])}"
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
  rest_is_slow(
    [
      ("vera", {"init": "structured", "sharing": "unique", "train": "b"}),
      ("unilora", {}),
      ("bitfit", {}),
    ]
  ),
)
def test_mixed_is_each_alone(method, settings, random_adapter):
  saved = three(random_adapter(method, task="sst2", **settings))
  bank = AdapterBank(saved)
  mixed = bank.logits(TEXTS, adapters=NAMED)
  own = {name: alone(saved[name], TEXTS) for name in set(NAMED)}
  np.testing.assert_allclose(mixed, chosen(own), rtol=0, atol=2e-5)
  assert np.abs(own["one"] - own["two"]).max() > 0.05  # the adapters differ


@pytest.mark.slow
def test_pairs_on_roberta_whose_head_is_deep(tiny_roberta, random_adapter):
  saved = three(random_adapter(task="rte", base=tiny_roberta))
  bank = AdapterBank(saved, capacity=7)
  texts = TEXTS[:20], TEXTS[20:40]
  mixed = bank.logits(*texts, adapters=NAMED[:20])
  own = {name: alone(saved[name], *texts) for name in set(NAMED)}
  want = chosen(own, NAMED[:20])
  np.testing.assert_allclose(mixed, want, rtol=0, atol=2e-5)


def test_one_name_for_all_texts_and_answers_in_its_labels(adapters, expected):
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


def test_heads_of_different_numbers_of_labels(
  adapters, expected, random_adapter, tmp_path
):
  three, one = (
    load_adapter(random_adapter(task=task)) for task in ("mnli", "stsb")
  )
  bank = AdapterBank({"two": adapters["one"], "three": three}, capacity=3)
  bank.add("one", one)
  texts = TEXTS[:6]
  logits = bank.logits(texts, adapters=["two", "three", "one"] * 2)
  want = [expected["one"], alone(three, texts), alone(one, texts)]
  for number, row in enumerate(logits):
    mine = want[number % 3][number]
    np.testing.assert_allclose(row[: len(mine)], mine, rtol=0, atol=2e-5)
    assert (row[len(mine) :] == -np.inf).all()
  film, pair, score = bank.answers(texts[:3], adapters=["two", "three", "one"])
  assert [len(x.probabilities) for x in (film, pair, score)] == [2, 3, 0]
  np.testing.assert_allclose(score.score, want[2][2][0], atol=2e-5)
  bank.save("two", tmp_path / "again")
  again = load_adapter(tmp_path / "again").tensors
  for name, value in adapters["one"].tensors.items():
    np.testing.assert_array_equal(again[name], value)


def test_each_text_is_cut_as_its_adapters_training_did(adapters):
  short = another(adapters["two"], 9, max_length=6)
  bank = AdapterBank({"long": adapters["one"], "short": short})
  texts = [TEXTS[11], TEXTS[11]]  # twelve words
  mixed = bank.logits(texts, adapters=["short", "long"])
  want = alone(short, texts)[0], alone(adapters["one"], texts)[1]
  np.testing.assert_allclose(mixed, want, rtol=0, atol=2e-5)
  assert bank.truncated == 1
  same = AdapterBank({"a": adapters["one"], "b": short}, max_length=6)
  same.logits(texts, adapters=["a", "b"])
  assert same.truncated == 2


@pytest.fixture
def compiled():
  """What jax has compiled, or read from its cache of programs, since then."""
  events = []

  def note(event, seconds, **about):
    if event.endswith("backend_compile_duration"):
      events.append(about)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield events
  jax.monitoring.unregister_event_duration_listener(note)


def test_add_replace_and_remove_compile_nothing(bank, adapters, compiled):
  before = bank.logits(TEXTS, adapters=NAMED)
  bank.replace("three", adapters["three"])
  new = another(adapters["one"], 17)
  want = alone(new, TEXTS)
  assert compiled
  compiled.clear()
  bank.add("four", new)
  bank.replace("three", new)
  bank.remove("two")
  bank.add("five", adapters["two"])
  assert len(bank) == 4 and "two" not in bank and "five" in bank
  assert list(bank) == ["one", "three", "four", "five"]
  named = [{"two": "five"}.get(name, name) for name in NAMED]
  after = bank.logits(TEXTS, adapters=named)
  np.testing.assert_array_equal(before, after)
  for name in ("three", "four"):
    logits = bank.logits(TEXTS, adapters=name)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)
  assert not compiled
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
  with pytest.raises(UserError, match="'one' already: replace"):
    bank.add("one", adapters["two"])
  with pytest.raises(UserError, match="no room for 3"):
    AdapterBank(adapters, capacity=2)
  with pytest.raises(UserError, match="none was given"):
    AdapterBank({})
  with pytest.raises(UserError, match="write none: ask for answers"):
    bank.generate(["Once"], adapters="one")
  with pytest.raises(UserError, match="2 texts and 1 names"):
    bank.logits(TEXTS[:2], adapters=["one"])


@pytest.mark.parametrize(
  "method, settings, words",
  [
    ("vera", {"rank": 4}, "rank: 4 there, 8 in the bank"),
    ("vera", {"projection_seed": 1}, r"projections \(digest\): \w+ there"),
    ("vera", {"train": "d"}, "train: d there, both in the bank"),
    ("vera", {"targets": ["query"]}, r"no encoder.*value\.vera_"),
    ("vera", {"task": "mnli"}, "labels: 3 there, at most 2 in the bank"),
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
  bank.add("four", load_adapter(random_adapter(task="sst2")))  # still free


def test_another_base_or_alpha_is_named(bank, adapters, random_adapter):
  other = another(adapters["one"], 1, base_fingerprint="0" * 64)
  with pytest.raises(UserError, match=r"base \(fingerprint\): 0{12} there"):
    bank.add("four", other)
  with pytest.raises(UserError, match="no usable rank=None"):
    bank.add("four", another(adapters["one"], 1, settings={}))
  saved = load_adapter(random_adapter("lora", task="sst2"))
  louder = random_adapter("lora", task="sst2", alpha=8.0)
  with pytest.raises(UserError, match="alpha: 8.0 there, 4.0 in the bank"):
    AdapterBank({"a": saved, "b": louder})


def test_targets_that_no_leaf_tells_are_compared(random_adapter):
  """Uni-LoRA's one vector has no layer in its name."""
  first, other = (
    random_adapter("unilora", task="sst2", targets=[name])
    for name in ("query", "key")
  )
  with pytest.raises(UserError, match="targets: key there, query in the bank"):
    AdapterBank({"a": first, "b": other})


def test_other_codes_or_parts_of_an_example(bank, adapters):
  codes = another(adapters["one"], 1, codes_digest="0" * 64)
  with pytest.raises(UserError, match=r"base \(codes\): 0{12} there"):
    bank.add("four", codes)
  word = another(adapters["one"], 1, task="superglue_wic")
  bank.add("four", word)
  with pytest.raises(UserError, match="asks about word, sentence1, sentence2"):
    bank.answers(TEXTS[:1], TEXTS[:1], adapters="four")


@pytest.mark.slow
def test_a_method_is_prepared_or_refused(random_adapter, tmp_path):
  """DVoRA's rows need a scale computed from their kernels."""
  saved = three(random_adapter("dvora+ia3", task="sst2"))
  bank = AdapterBank(saved)
  mixed = bank.logits(TEXTS, adapters=NAMED)
  own = {name: alone(saved[name], TEXTS) for name in set(NAMED)}
  np.testing.assert_allclose(mixed, chosen(own), rtol=0, atol=2e-5)
  with pytest.raises(UserError, match="'one' can't be saved from a bank"):
    bank.save("one", tmp_path)
  other = SETTINGS["dvora"] | {"rank": 2}
  settings = saved["one"].about["settings"] | {"dvora": other}
  with pytest.raises(UserError, match="dvora.rank: 2 there, 8 in the bank"):
    bank.replace("one", another(saved["one"], 3, settings=settings))
  for method in ("full", "randlora"):
    with pytest.raises(UserError, match=f"method {method}"):
      AdapterBank({"all": random_adapter(method, task="sst2")})


def test_where_an_adapter_started_is_no_difference(bank, adapters):
  settings = {**adapters["one"].about["settings"], "d_init": 1e-7}
  new = another(adapters["one"], 3, settings=settings)
  bank.add("four", new)
  logits = bank.logits(TEXTS[:5], adapters="four")
  np.testing.assert_allclose(logits, alone(new, TEXTS[:5]), rtol=0, atol=2e-5)


def stored(saved, pair):
  """An adapter with its A and B in the file, as imported ones may have them."""
  settings = {**saved.about["settings"], "init": "stored"}
  tensors = {f"projections.{k}": np.asarray(pair[k]) for k in "AB"}
  about = {**saved.about, "settings": settings}
  return saved._replace(about=about, tensors=saved.tensors | tensors)


def test_a_stored_pair_fits_by_its_own_digest(adapters):
  pair = restore_adapter(adapters["one"]).projections
  other = another(adapters["two"], 3)
  bank = AdapterBank(adapters, capacity=4)
  bank.add("four", stored(other, pair))
  want = alone(stored(other, pair), TEXTS)
  mixed = bank.logits(TEXTS, adapters="four")
  np.testing.assert_allclose(mixed, want, rtol=0, atol=2e-5)
  with pytest.raises(UserError, match="digest"):
    bank.replace("four", stored(other, {k: 2 * x for k, x in pair.items()}))


@pytest.mark.parametrize("init", ["kaiming_uniform", "stored"])
def test_what_is_saved_comes_back(init, adapters, tmp_path):
  saved = adapters["one"]
  if init == "stored":
    saved = stored(saved, restore_adapter(saved).projections)
  bank = AdapterBank({"one": saved}, capacity=2)
  bank.save("one", tmp_path / "again")
  again = load_adapter(tmp_path / "again")
  assert again.tensors.keys() == saved.tensors.keys()
  for name, value in saved.tensors.items():
    np.testing.assert_array_equal(again.tensors[name], value)
  made = digest(restore_adapter(again).projections)
  assert made == saved.about["projection_digest"]
