"""The server, asked by OpenAI's own client: each name by its own adapter."""

import json
import logging
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
testclient = pytest.importorskip("starlette.testclient")

from tests.random_adapter import write_adapter  # noqa: E402
from vera_jax.adapters.files import load_adapter  # noqa: E402
from vera_jax.errors import UserError  # noqa: E402
from vera_jax.generate.generator import Generator  # noqa: E402
from vera_jax.pretrained.classifier import restore_adapter  # noqa: E402
from vera_jax.serve.bank import AdapterBank  # noqa: E402
from vera_jax.serve.http import Limits, Service  # noqa: E402
from vera_jax.serve.rows import Request, Rows  # noqa: E402

TOKEN = "a-token-that-nobody-may-read"
NAMES = {"ann": 0.5, "bob": 0.8, "eve": 1.2}  # how far each is from the base
PROMPT, NEW, LENGTH = "Once upon a time", 12, 128


@pytest.fixture(scope="module")
def stories() -> Path:
  folder = Path(__file__).resolve().parents[3] / "shared/data/checkpoints"
  if not (folder / "stories260K").is_dir():
    pytest.skip("the small Llama is not beside the checkout")
  return folder / "stories260K"


@pytest.fixture(scope="module")
def folder(stories, tmp_path_factory) -> Path:
  """A folder of adapters that have one base and one pair."""
  folder = tmp_path_factory.mktemp("adapters")
  about = {"base": stories, "kind": "language_modelling", "rank": 8}
  about["targets"] = ["q_proj", "v_proj"]
  for name, spread in NAMES.items():
    write_adapter(folder / name, spread=spread, **about)
  write_adapter(folder / "other", **about | {"rank": 4})
  return folder


@pytest.fixture(scope="module")
def alone(stories, folder):
  """What each model writes without a server, the likeliest words."""
  answers = {}
  for name in ("ann", "bob"):
    decoder = restore_adapter(load_adapter(folder / name))
    generator = Generator(decoder, keep_adapter=True)
    answers[name] = "".join(generator.stream(PROMPT, max_new_tokens=NEW))
  known = json.loads((stories / "expected_greedy.json").read_text())["ids"]
  start = len(generator.encode(PROMPT, max_new_tokens=NEW))
  answers["base"] = generator.decode(known[start : start + NEW])
  assert len({*answers.values()}) == 3
  return answers


@pytest.fixture(scope="module")
def bank(folder):
  return AdapterBank(
    {name: folder / name for name in ("ann", "bob")}, capacity=4
  )


@pytest.fixture(scope="module")
def rows(bank):
  rows = Rows(bank, rows=4, length=LENGTH, piece=16, queue=20)
  rows.warm_up()
  return rows


@pytest.fixture(scope="module")
def address(bank, rows, folder):
  """One server for all tests."""
  service = Service(
    bank,
    base="base",
    rows=rows,
    template="alpaca",
    token=TOKEN,
    limits=Limits(body=5000, clients=30, seconds=20),
    folders=[folder],
  )
  config = uvicorn.Config(service, log_config=None, access_log=False, port=0)
  server = uvicorn.Server(config)
  with socket.create_server(("127.0.0.1", 0)) as listening:
    thread = threading.Thread(target=server.run, args=[[listening]])
    thread.start()
    yield "http://{}:{}/v1".format(*listening.getsockname())
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(address):
  with openai.OpenAI(
    base_url=address, api_key=TOKEN, max_retries=0, timeout=30
  ) as client:
    yield client


@pytest.fixture
def slow(rows, monkeypatch):
  """Each step takes a while, so that answers are met while they are written."""
  step = type(rows).step

  def slowly() -> bool:
    time.sleep(0.03)
    return step(rows)

  monkeypatch.setattr(rows, "step", slowly)


def write(client, model, **settings):
  settings = {"max_tokens": NEW, "temperature": 0} | settings
  return client.completions.create(model=model, prompt=PROMPT, **settings)


def wait_for(condition, seconds=10.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_each_name_is_answered_by_its_own_adapter(client, alone):
  """Asked at the same time, as often as there are rows, and more."""
  assert {model.id for model in client.models.list()} == {"base", "ann", "bob"}
  assert client.models.retrieve("ann").parent == "base"
  models = ["ann", "bob", "base"] * 4
  with ThreadPoolExecutor(len(models)) as threads:
    answers = list(threads.map(lambda name: write(client, name), models))
  for model, answer in zip(models, answers, strict=True):
    assert answer.model == model
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == (alone[model], "length")
    assert answer.usage.completion_tokens == NEW
    assert answer.usage.total_tokens == NEW + answer.usage.prompt_tokens


def test_a_stream_is_the_whole_in_parts(client):
  drawn = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "logprobs": 2}
  whole = write(client, "bob", **drawn).choices[0]
  again = write(client, "bob", **drawn | {"seed": 6}).choices[0]
  assert again.text != whole.text
  *parts, last = write(
    client,
    "bob",
    stream=True,
    stream_options={"include_usage": True},
    **drawn,
  )
  assert not last.choices and last.usage.completion_tokens == NEW
  parts = [part.choices[0] for part in parts]
  assert "".join(part.text for part in parts) == whole.text
  assert [x for part in parts for x in part.logprobs.tokens] == (
    whole.logprobs.tokens
  )
  offsets = [x for part in parts for x in part.logprobs.text_offset]
  assert offsets == whole.logprobs.text_offset
  assert parts[-1].finish_reason == "length"
  assert all(len(top) == 2 for top in whole.logprobs.top_logprobs)


def test_texts_that_end_an_answer_are_no_part_of_it(client, alone):
  [stop] = re.findall(r"\S+", alone["bob"])[1:2]
  [choice] = write(client, "bob", stop=[stop, "\0"]).choices
  assert choice.text == alone["bob"].partition(stop)[0]
  assert choice.finish_reason == "stop"


def test_several_prompts_have_an_answer_each(client, alone):
  """Texts, and the same texts as tokens."""
  prompts = [PROMPT, "The dog"]
  answer = client.completions.create(
    model="ann", prompt=prompts, max_tokens=NEW, temperature=0
  )
  assert [choice.index for choice in answer.choices] == [0, 1]
  assert answer.choices[0].text == alone["ann"] != answer.choices[1].text


def test_a_chat_is_put_into_the_template(client):
  messages = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
  asked = {"model": "ann", "messages": messages, "max_tokens": 5, "seed": 1}
  whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
  message = whole.choices[0].message
  assert message.role == "assistant"
  assert whole.usage.prompt_tokens > 40  # Alpaca's words among them
  told = whole.choices[0].logprobs.content
  assert len(told) == 5 and all(len(x.top_logprobs) == 1 for x in told)
  parts = list(client.chat.completions.create(**asked, stream=True))
  assert parts[0].choices[0].delta.role == "assistant"
  text = "".join(part.choices[0].delta.content or "" for part in parts)
  assert text == message.content
  more = [*messages, message, {"role": "user", "content": "And?"}]
  with pytest.raises(openai.BadRequestError) as caught:
    client.chat.completions.create(**asked | {"messages": more})
  assert caught.value.code == "context_length_exceeded"
  asked["messages"] = [{"role": "system", "content": "Be kind."}, *messages]
  with pytest.raises(openai.BadRequestError, match="by turns"):
    client.chat.completions.create(**asked)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"n": 2}, "n is not supported"),
    ({"logit_bias": {"3": 1}}, "logit_bias is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"extra_body": {"tools": [{"type": "function"}]}}, "tools is not"),
    ({"extra_body": {"min_p": 0.1}}, "min_p: this field is not known"),
    ({"extra_body": {"temperature": "hot"}}, "temperature: .*number"),
    ({"extra_body": {"max_tokens": True}}, "max_tokens: "),
    ({"temperature": 1e-9}, "temperature is 0, or"),
    ({"top_p": 0.0}, "top_p: "),
    ({"max_tokens": LENGTH}, "more than the 128 that"),
    ({"logprobs": 21}, "logprobs: "),
    ({"stop": ""}, "stop has an empty text"),
    ({"stream_options": {"include_usage": True}}, "only with stream"),
    ({"extra_body": {"prompt": []}}, "prompt: .*at least 1 item"),
    ({"extra_body": {"prompt": ["a"] * 257}}, "prompt: .*at most 256 items"),
    ({"extra_body": {"prompt": [[1, 10**6]]}}, "vocabulary"),
    ({"extra_body": {"prompt": {"a": 1}}}, "prompt: "),
  ],
)
def test_what_is_wrong_is_named(client, changes, words):
  """And what changes nothing is taken."""
  with pytest.raises(openai.BadRequestError, match=words) as caught:
    write(client, "ann", **changes)
  assert caught.value.type == "invalid_request_error"


def test_fields_that_change_nothing_are_taken(client, alone):
  answer = write(
    client, "ann", n=1, user="me", best_of=1, logit_bias={}, suffix=None
  )
  assert answer.choices[0].text == alone["ann"]


def test_an_unknown_name_is_told_the_nearest(client):
  with pytest.raises(openai.NotFoundError, match="nearest names: ann") as error:
    write(client, "anna")
  assert error.value.code == "model_not_found"


def test_a_wrong_token_is_refused_and_none_is_logged(client, address, caplog):
  caplog.set_level(logging.INFO, "vera_jax.serve")
  with openai.OpenAI(base_url=address, api_key="no", max_retries=0) as other:
    with pytest.raises(openai.AuthenticationError, match="token") as caught:
      write(other, "ann")
  assert caught.value.code == "invalid_api_key"
  write(client, "ann")
  wait_for(lambda: "model=ann" in caplog.text)
  assert "401" in caplog.text and PROMPT not in caplog.text
  assert TOKEN not in caplog.text and "Bearer" not in caplog.text


def test_bodies_that_are_none_and_other_addresses(client):

  def refused(path, content, status, kind="application/json"):
    answer = client._client.post(
      path,
      content=content,
      headers=client.auth_headers | {"Content-Type": kind},
    )
    assert answer.status_code == status
    return answer.json()["error"]["message"]

  refused("completions", b"{", 400)
  refused("completions", b"\xff", 400)
  refused("completions", b"[" * 4000, 400)
  refused("completions", b'{"model":"ann","prompt":"\\ud800"}', 400)
  refused("completions", b" " * 5001, 413)
  assert "JSON" in refused("completions", b"{}", 415, "text/plain")
  refused("nothing", b"{}", 404)
  refused("models", b"{}", 405)
  refused("classify", b'{"model": "ann", "input": "a"}', 400)
  assert len(list(client.models.list())) == 3  # the connection is whole


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(
  client, rows, slow, caplog, stream
):
  caplog.set_level(logging.INFO, "vera_jax.serve")
  if stream:
    answer = write(client, "ann", max_tokens=80, stream=True)
    next(iter(answer))
    answer.close()
  else:
    with pytest.raises(openai.APITimeoutError):
      write(client.with_options(timeout=0.3), "ann", max_tokens=80)
  wait_for(lambda: not rows.running, seconds=1)  # 80 steps take 2.4
  wait_for(lambda: " 499 " in caplog.text)


def test_more_than_may_wait_is_refused(client, rows, slow):
  """The openai package tries such an answer again, by itself."""

  def ask(_):
    try:
      write(client, "ann", max_tokens=15)
    except openai.RateLimitError as error:
      return error.code
    return "answered"

  with ThreadPoolExecutor(28) as threads:
    outcomes = list(threads.map(ask, range(28)))
  assert set(outcomes) == {"answered", "queue_full"}
  assert outcomes.count("answered") >= 20


def post(client, path, **body):
  """The status and what it says."""
  try:
    return 200, client.post(path, cast_to=object, body=body)
  except openai.APIStatusError as error:
    return error.status_code, error.message


def test_adapters_are_loaded_below_their_folder_alone(client, folder, tmp_path):
  shutil.copytree(folder / "eve", tmp_path / "eve")
  (folder / "link").symlink_to(tmp_path / "eve")
  load = "/load_lora_adapter"
  for path in ("../eve", str(tmp_path / "eve"), "link", "", ".", "nowhere"):
    status, said = post(client, load, lora_name="eve", lora_path=path)
    assert status == 400 and "lora_path" in said
  status, said = post(client, load, lora_name="eve", lora_path="other")
  assert status == 400 and "rank" in said
  status, said = post(client, load, lora_name="base", lora_path="eve")
  assert status == 400
  named = {"lora_name": "eve", "lora_path": str(folder / "eve")}
  with ThreadPoolExecutor(4) as threads:  # one of them is the first
    done = list(threads.map(lambda _: post(client, load, **named)[0], range(4)))
  assert sorted(done) == [200, 400, 400, 400]
  assert write(client, "eve").choices
  unload = "/unload_lora_adapter"
  assert post(client, unload, lora_name="eve")[0] == 200
  assert post(client, unload, lora_name="eve")[0] == 404
  assert post(client, unload, lora_name="base")[0] == 400
  with pytest.raises(openai.NotFoundError):
    write(client, "eve")


def test_an_answer_ends_by_the_vectors_with_which_it_began(
  client, rows, alone, slow
):
  """The name is given to another adapter, or taken away, meanwhile."""
  load, new = "/load_lora_adapter", {"lora_name": "x", "load_inplace": True}
  assert post(client, load, **new, lora_path="ann")[0] == 200
  first = write(client, "x", stream=True)
  wait_for(lambda: rows.running)
  assert post(client, load, **new, lora_path="bob")[0] == 200
  second = write(client, "x", stream=True)
  wait_for(lambda: rows.running == 2)
  assert post(client, "/unload_lora_adapter", lora_name="x")[0] == 200
  for stream, name in ((first, "ann"), (second, "bob")):
    text = "".join(part.choices[0].text for part in stream)
    assert text == alone[name]


# What needs no running scheduler, or none that runs to the end.


def asker(service):
  return testclient.TestClient(service, base_url="http://localhost")


@pytest.fixture
def idle(bank):
  """A scheduler that nobody steps."""
  return Rows(bank, rows=2, length=LENGTH, queue=1)


ASKED = {"model": "ann", "prompt": "a", "max_tokens": 1}


def test_time_is_limited(bank, idle):
  limits = Limits(seconds=0.1)
  client = asker(Service(bank, base="base", rows=idle, limits=limits))
  answer = client.post("/v1/completions", json=ASKED)
  assert answer.status_code == 408
  assert answer.headers["x-should-retry"] == "false"
  idle.step()  # the row and the queue are free again
  answer = client.post("/v1/completions", json=ASKED | {"stream": True})
  assert answer.status_code == 200
  [event] = re.findall("data: (.*)\n\n", answer.text)
  assert json.loads(event)["error"]["code"] == "timeout"
  assert idle.waiting == 1
  idle.step()
  assert idle.waiting == idle.running == 0


def test_numbers_are_limited(bank, idle):
  service = Service(bank, base="base", rows=idle, limits=Limits(clients=0))
  client = asker(service)
  assert client.post("/v1/completions", json=ASKED).status_code == 429
  assert client.get("/healthz").json()["status"] == "ok"
  idle.submit(Request((1, 2)), print)
  client = asker(Service(bank, base="base", rows=idle))
  answer = client.post("/v1/completions", json=ASKED)
  assert answer.status_code == 429
  assert answer.json()["error"]["code"] == "queue_full"
  answer = client.post("/v1/load_lora_adapter", json={})
  assert answer.status_code == 403


def test_without_a_token_other_names_of_this_machine_are_refused(bank):
  client = asker(Service(bank, base="base"))
  assert client.get("/v1/models").status_code == 200
  names = {"Host": "evil.example:8000"}
  assert client.get("/v1/models", headers=names).status_code == 403
  with pytest.raises(UserError, match="same name"):
    Service(bank, base="ann")


def test_what_is_running_ends_with_an_error_where_the_server_does(
  bank, idle, monkeypatch
):
  service = Service(bank, base="base", rows=idle)
  monkeypatch.setattr(idle, "step", lambda: False)
  with asker(service) as client:
    service.give_up_after(0.2)
    # what the scheduler does for those who are given up
    threading.Timer(0.5, lambda: type(idle).step(idle)).start()
    answer = client.post("/v1/completions", json=ASKED)
    assert answer.status_code == 503
    assert client.post("/v1/completions", json=ASKED).status_code == 503
    assert client.get("/healthz").status_code == 503


def test_a_scheduler_that_fails_is_said(bank, idle, monkeypatch, caplog):
  failed = threading.Event()
  service = Service(bank, base="base", rows=idle, on_failure=failed.set)

  def fail() -> bool:
    if idle.waiting:
      raise ValueError("broken")
    return False

  monkeypatch.setattr(idle, "step", fail)
  with asker(service) as client:
    answer = client.post("/v1/completions", json=ASKED)
    assert answer.status_code == 500
    assert "broken" in answer.json()["error"]["message"]
    assert failed.wait(5)
    assert client.get("/healthz").status_code == 503
    assert client.post("/v1/completions", json=ASKED).status_code == 503


def test_texts_are_classified_each_by_its_own_adapter(random_adapter):
  adapters = {"a": random_adapter(), "b": random_adapter(spread=0.7)}
  bank = AdapterBank(adapters)
  client = asker(Service(bank, base="tiny"))
  texts = ["word1 word2", "word3"]

  def ask(**body):
    return client.post("/v1/classify", json=body)

  for name in adapters:
    wanted = bank.answers(texts, adapters=name)
    done = ask(model=name, input=texts).json()
    assert done["classes"] == ["entailment", "not_entailment"]
    for answer, row in zip(wanted, done["data"], strict=True):
      assert (row["label"], row["score"]) == (answer.label, answer.score)
      assert row["probs"] == list(answer.probabilities)
  pairs = [["word1", "word2"], ["word3", "word4"]]
  done = ask(model="a", input=pairs).json()["data"]
  wanted = bank.answers(*zip(*pairs, strict=True), adapters="a")
  assert [row["score"] for row in done] == [x.score for x in wanted]
  assert ask(model="a", input=[["word1"]]).status_code == 400
  assert ask(model="tiny", input="word1").status_code == 404
  answer = client.post("/v1/completions", json=ASKED)
  assert answer.status_code == 400
  assert [x["id"] for x in client.get("/v1/models").json()["data"]] == [
    "a",
    "b",
  ]
