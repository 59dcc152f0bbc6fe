"""A row writes what its adapter writes alone, whatever stands beside it."""

import threading
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.conftest import (  # noqa: F401 - fixtures
  tiny_decoder,
  words_adapter,
)
from tests.serve.test_bank import compiled  # noqa: F401 - a fixture
from tests.slow import rest_is_slow
from vera_jax.adapters.files import load_adapter
from vera_jax.errors import UserError
from vera_jax.generate.generator import Generator
from vera_jax.generate.sampling import GREEDY, Sampling
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.serve import bank as bank_module
from vera_jax.serve import rows as rows_module
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.rows import QueueFull, Request, Rows

NAMES = ("a", "b", "c")
RULES = (
  GREEDY,
  Sampling(temperature=1.2),
  Sampling(temperature=1.5, top_p=0.8, top_k=9, no_repeat_ngram=2),
  Sampling(no_repeat_ngram=1),
)
UNLIKE = RULES[-1]  # the likeliest words, no one twice
RNG = np.random.default_rng(3)
PROMPTS = [
  " ".join(RNG.choice([f"w{i}" for i in range(20)], 1 + 5 * i % 23))
  for i in range(12)
]
# of each prompt: who answers, by which rule, how long
WHO = [(*NAMES, None)[i % 4] for i in range(len(PROMPTS))]
HOW = [RULES[(i + i // 4) % len(RULES)] for i in range(len(PROMPTS))]
NEW = [13] * len(PROMPTS)
SEEDS = list(range(len(PROMPTS)))


@pytest.fixture(autouse=True)
def short_caches(monkeypatch):
  """The cache grows and shrinks within the tiny model's 48 tokens, and all
  tests have the same programs."""
  monkeypatch.setattr(rows_module, "SHORTEST", 32)
  monkeypatch.setattr(bank_module, "ROWS", 4)
  monkeypatch.setattr(bank_module, "Rows", partial(Rows, piece=8))


def three(folder):
  """Adapters whose numbers have nothing in common."""
  first, rng = load_adapter(folder), np.random.default_rng(5)
  return {
    name: first._replace(
      tensors={
        leaf: rng.standard_normal(value.shape).astype(np.float32)
        for leaf, value in first.tensors.items()
      }
    )
    for name in NAMES
  }


def writer(saved, folder):
  """The generator of one adapter, or of the base alone."""
  if saved is None:
    return Generator(load_classifier(folder))
  return Generator(restore_adapter(saved), keep_adapter=True)


def alone(generator, number, **changes):
  """What it writes; as a stream, which is the same and compiles less."""
  settings = {
    "how": HOW[number],
    "max_new_tokens": NEW[number],
    "seed": SEEDS[number],
  }
  return "".join(generator.stream(PROMPTS[number], **settings | changes))


@pytest.fixture(scope="module")
def saved(words_adapter):  # noqa: F811
  return three(words_adapter)


@pytest.fixture(scope="module")
def bank(saved):
  return AdapterBank(saved, capacity=5)


@pytest.fixture(scope="module")
def writers(saved, tiny_decoder):  # noqa: F811
  return {
    name: writer(saved.get(name), tiny_decoder) for name in (*NAMES, None)
  }


@pytest.fixture(scope="module")
def expected(writers):
  return [alone(writers[who], number) for number, who in enumerate(WHO)]


@pytest.fixture
def rows(bank):
  return Rows(bank, rows=4, piece=8)


class Heard(list):
  """The tokens of a request."""

  @property
  def text(self):
    return "".join(token.text for token in self)

  @property
  def finish(self):
    return self[-1].finish if self else None


def request(bank, number=0, **changes):
  tokens = bank.generator.encode(PROMPTS[number], max_new_tokens=1)
  settings = {"adapter": WHO[number], "how": HOW[number], "seed": SEEDS[number]}
  settings |= {"max_new_tokens": NEW[number]}
  return Request(tuple(tokens), **settings | changes)


def finish(rows):
  while rows.step():
    pass


def test_a_row_writes_what_its_adapter_writes_alone(bank, expected):
  texts = bank.generate(
    PROMPTS, adapters=WHO, how=HOW, max_new_tokens=NEW, seed=SEEDS
  )
  assert texts == expected
  assert len(set(expected)) > 8


def test_few_prompts_take_few_rows(bank, monkeypatch):
  made = []

  class Idle:
    def __init__(self, bank, *, rows, queue):
      made.append(rows)

    def submit(self, request, on_token):
      return SimpleNamespace(error="")

    def step(self):
      return False

  monkeypatch.setattr(bank_module, "Rows", Idle)
  for count in (1, 2, 3, 4, 9):
    bank.generate(PROMPTS[:count], adapters="a", max_new_tokens=2)
  assert made == [1, 2, 4, 4, 4]


def test_rows_join_and_leave_and_nothing_is_compiled(
  bank,
  saved,
  rows,
  expected,
  compiled,  # noqa: F811
):
  bank.replace("c", saved["c"])  # compiled once for all
  rows.warm_up()
  assert compiled
  compiled.clear()
  heard = [Heard() for _ in PROMPTS]
  tickets = [
    rows.submit(request(bank, i, logprobs=i % 3 or None), heard[i].append)
    for i in range(len(PROMPTS))
  ]
  more = Heard()
  bank.add("more", saved["a"])
  for _ in range(5):
    rows.step()
  gone = rows.submit(request(bank, 8, adapter="more"), more.append)
  bank.remove("more")
  rows.cancel(gone)
  finish(rows)
  assert not compiled
  assert [tokens.text for tokens in heard] == expected
  assert more.finish == "cancelled"
  assert not any(ticket.error for ticket in tickets)
  assert rows.running == rows.waiting == 0


def test_nobody_waits_longer_than_for_a_piece(bank, rows):
  """A prompt of 40 tokens takes five steps, in each of which others write."""
  quick, slow = Heard(), Heard()
  rows.submit(request(bank, 1, max_new_tokens=9, how=GREEDY), quick.append)
  rows.step()
  assert len(quick) == 2  # read, and a word behind the first one
  long = Request(tuple(3 + i % 20 for i in range(40)), "a", max_new_tokens=2)
  rows.submit(long, slow.append)
  for steps in range(1, 5):
    rows.step()
    assert (len(quick), len(slow)) == (2 + steps, 0)
  rows.step()
  assert len(slow) == 2


def test_the_first_to_come_is_the_first_to_be_answered(bank, rows):
  order = []
  for number in range(7):
    one = request(bank, 1, max_new_tokens=3, how=GREEDY)
    rows.submit(one, lambda token, n=number: order.append(n))
  finish(rows)
  firsts = list(dict.fromkeys(order))
  assert firsts == sorted(firsts)


def test_what_was_replaced_or_removed_finishes_its_answers(
  bank, saved, rows, writers
):
  """Of five requests four have a row, and one still waits."""
  heard = [Heard() for _ in range(5)]
  bank.add("d", saved["a"])
  for tokens in heard:
    rows.submit(
      request(bank, 3, adapter="d", how=UNLIKE, max_new_tokens=8), tokens.append
    )
  rows.step()
  bank.replace("d", saved["b"])
  new = Heard()
  rows.submit(
    request(bank, 3, adapter="d", how=UNLIKE, max_new_tokens=8), new.append
  )
  bank.remove("d")
  finish(rows)
  old, later = (
    alone(writers[name], 3, how=UNLIKE, max_new_tokens=8) for name in "ab"
  )
  assert {tokens.text for tokens in heard} == {old} != {later}
  assert new.text == later
  with pytest.raises(UserError, match="no adapter 'd'"):
    rows.submit(request(bank, 3, adapter="d"), new.append)


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(bank, rows, writers):
  short, whole = (
    alone(writers["a"], 0, how=UNLIKE, max_new_tokens=n) for n in (4, 12)
  )
  stop = f"{short.split()[-1]} {whole[len(short) :].split()[0]}"
  want = whole[: whole.index(stop)]
  for length, text, end in ((12, want, "stop"), (4, short, "length")):
    # what might have become a stop text is part of the answer in the end
    heard = Heard()
    asked = request(
      bank, 0, how=UNLIKE, max_new_tokens=length, stop=("zz", stop)
    )
    rows.submit(asked, heard.append)
    finish(rows)
    assert (heard.text, heard.finish) == (text, end)
  assert bank.generate(
    PROMPTS[:1], adapters="a", how=UNLIKE, max_new_tokens=12, stop=[stop]
  ) == [want]


@pytest.mark.slow
def test_probabilities_come_with_the_words(bank, rows, writers):
  heard = Heard()
  rows.submit(request(bank, 0, logprobs=2, max_new_tokens=3), heard.append)
  finish(rows)
  generator = writers["a"]
  ids = [*request(bank, 0).prompt, *(token.id for token in heard)]
  words = generator.module.apply(generator.variables, jnp.array([ids]))
  scores = jax.nn.log_softmax(words.hidden @ words.kernel)[0]
  for place, token in enumerate(heard, len(ids) - len(heard) - 1):
    order = np.argsort(-scores[place])[:2]
    np.testing.assert_allclose(
      token.logprob, scores[place, token.id], atol=1e-4
    )
    assert [word for word, _ in token.top] == order.tolist()
    np.testing.assert_allclose(
      [chance for _, chance in token.top], scores[place, order], atol=1e-4
    )


def test_a_broken_adapter_harms_no_other_row(bank, saved, rows, writers):
  tensors = {
    name: np.full_like(value, np.nan)
    for name, value in saved["a"].tensors.items()
  }
  bank.add("broken", saved["a"]._replace(tensors=tensors))
  first = [Heard() for _ in range(4)]
  tickets = [
    rows.submit(request(bank, 2, adapter=name, how=UNLIKE), tokens.append)
    for name, tokens in zip(("a", *["broken"] * 3), first, strict=True)
  ]
  after = [Heard() for _ in range(4)]  # in the rows that it had
  for tokens in after:
    rows.submit(request(bank, 2, how=UNLIKE, adapter="b"), tokens.append)
  finish(rows)
  assert [t.finish == "error" for t in first] == [False, True, True, True]
  assert "not finite" in tickets[1].error and not tickets[0].error
  assert first[0].text == alone(writers["a"], 2, how=UNLIKE)
  assert {t.text for t in after} == {alone(writers["b"], 2, how=UNLIKE)}
  with pytest.raises(UserError, match="Prompt 2: The next word can't"):
    named = ["a", "broken", "a"]  # in four rows, which are compiled already
    bank.generate(PROMPTS[:3], adapters=named, max_new_tokens=4)
  bank.remove("broken")


def test_a_request_that_is_given_up_frees_its_row(bank, rows):
  heard = [Heard() for _ in range(6)]
  tickets = [
    rows.submit(request(bank, 1, max_new_tokens=30), t.append) for t in heard
  ]
  rows.step()
  assert (rows.running, rows.waiting) == (4, 2)
  rows.cancel(tickets[0])  # has a row
  rows.cancel(tickets[5])  # waits for one
  rows.step()
  assert (rows.running, rows.waiting) == (4, 0)
  assert [t.finish for t in heard] == ["cancelled", *[None] * 4, "cancelled"]

  def refuse(token):
    raise OSError("gone")

  broken = rows.submit(request(bank, 1), refuse)
  for ticket in tickets[1:5]:
    rows.cancel(ticket)
  finish(rows)
  assert broken.error == "gone" and rows.running == 0


def test_a_full_queue_and_what_has_no_room(bank):
  rows = Rows(bank, rows=4, piece=8, queue=3, per_client=2, length=20)
  take = Heard().append
  for client in ("ann", "ann", "bob"):
    rows.submit(request(bank, 1, client=client), take)
  with pytest.raises(QueueFull, match="3 requests wait"):
    rows.submit(request(bank, 1, client="cid"), take)
  rows.step()
  with pytest.raises(QueueFull, match="2 of your requests"):
    rows.submit(request(bank, 1, client="ann"), take)
  rows.submit(request(bank, 1, client="cid"), take)
  for changes, words in (
    ({"max_new_tokens": 40}, "more than the"),
    ({"adapter": "nobody"}, "no adapter 'nobody'. It has: a, b, c"),
    ({"logprobs": 21}, "from 0 to 20"),
    ({"how": Sampling(top_k=3)}, "at temperature 0"),
    ({"prompt": ()}, "The prompt is empty"),
    ({"seed": 2**64}, "64 bits"),
  ):
    with pytest.raises(UserError, match=words):
      asked = {**vars(request(bank, 0)), **changes}
      rows.submit(Request(**asked), take)
  with pytest.raises(UserError, match="room for 48"):
    Rows(bank, length=49)
  finish(rows)


def test_a_thread_runs_until_it_is_told_to_stop(bank, rows, expected):
  stop, heard = threading.Event(), [Heard() for _ in PROMPTS]
  thread = threading.Thread(target=rows.run, args=(stop,))
  thread.start()
  for number, tokens in enumerate(heard):
    rows.submit(request(bank, number), tokens.append)
  stop.set()  # what was taken is finished
  thread.join(60)
  assert not thread.is_alive()
  assert [tokens.text for tokens in heard] == expected


def test_the_least_recently_used_wait_on_the_host(saved, expected, compiled):  # noqa: F811
  bank = AdapterBank({"a": saved["a"]}, capacity=4, resident=2)
  settings = {"how": HOW, "max_new_tokens": NEW, "seed": SEEDS}
  bank.add("b", saved["b"])
  bank.add("c", saved["c"])
  assert {leaf.shape[0] for leaf in jax.tree.leaves(bank.params)} == {2}
  assert bank.generate(PROMPTS, adapters=WHO, **settings) == expected
  compiled.clear()
  for name in ("a", "b", "c", "b"):
    before = bank.vectors(bank.held(name))
    jax.tree.map(
      np.testing.assert_array_equal, before, bank.vectors(bank.held(name))
    )
  on_device = [name for name in bank if bank.held(name).slot is not None]
  assert on_device == ["b", "c"]
  assert bank.generate(PROMPTS, adapters=WHO, **settings) == expected
  assert not compiled
  with pytest.raises(UserError, match="only 2 lie on the device"):
    bank.slots(NAMES)
  with pytest.raises(UserError, match="to train them, make the bank without"):
    bank.model  # noqa: B018


@pytest.mark.parametrize(
  "method, settings",
  rest_is_slow(
    [
      ("dora", {}),
      ("lora", {}),
      ("unilora", {}),
      ("bitfit", {}),
      ("vera+bitfit", {}),
      ("ia3", {"targets": ["key", "value"]}),
    ],
    quick=0,
  ),
)
def test_other_methods_write_as_well(
  method,
  settings,
  tiny_decoder,  # noqa: F811
  random_adapter,
  writers,
):
  """Beside an adapter a row of the base alone, which none has touched."""
  folder = random_adapter(
    method,
    base=tiny_decoder,
    task="own_texts",
    kind="language_modelling",
    spread=0.4,
    **settings,
  )
  bank = AdapterBank({"one": folder})
  rows, heard = Rows(bank, rows=4, piece=8), [Heard() for _ in range(4)]
  for number, tokens in enumerate(heard):
    name = ("one", None)[number % 2]
    rows.submit(
      request(bank, number, adapter=name, how=UNLIKE, max_new_tokens=8),
      tokens.append,
    )
  finish(rows)
  texts = [tokens.text for tokens in heard]
  saved = load_adapter(folder)
  pair = writer(saved, tiny_decoder), writers[None]
  want = [alone(pair[i % 2], i, how=UNLIKE, max_new_tokens=8) for i in range(4)]
  assert texts == want
  assert want[0] != alone(pair[1], 0, how=UNLIKE, max_new_tokens=8)
