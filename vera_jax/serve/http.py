"""A bank's answers over HTTP, in the words of OpenAI's and vLLM's interfaces.

  uvicorn.run(Service(bank, base="smollm2", rows=Rows(bank)))

A request's `model` names the adapter that answers, or the base. The name is
looked up once, when the request is taken: the answer is by the vectors that it
had then, to the end, whatever is loaded, replaced or removed meanwhile.

The scheduler of rows steps in a thread of its own. What a client waits for is
given up when it goes away, and its row is free at the next step.
"""

import asyncio
import base64
import difflib
import hmac
import logging
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from vera_jax.adapters.files import SavedAdapter, load_adapter
from vera_jax.data.templates import CHAT, PLAIN
from vera_jax.errors import UserError
from vera_jax.generate.conversation import conversation_ids
from vera_jax.generate.generator import TooLong
from vera_jax.generate.text_pieces import BROKEN
from vera_jax.models.family import IMAGES
from vera_jax.serve.bank import AdapterBank, Held
from vera_jax.serve.bodies import (
  Chat,
  Classification,
  Completion,
  Fields,
  Load,
  Unload,
  as_request,
)
from vera_jax.serve.predictor import Answer
from vera_jax.serve.rows import (
  CANCELLED,
  ERROR,
  QueueFull,
  Request,
  Rows,
  Ticket,
  Token,
)
from vera_jax.terminal import json_line, printable

log = logging.getLogger(__name__)
GONE = 499  # what proxies log for a client that has gone away
HEALTH = "/healthz"
LOCAL = {"127.0.0.1", "localhost", "[::1]"}  # names of this machine
HEADERS = {  # that go with errors
  401: {"WWW-Authenticate": "Bearer"},
  408: {"X-Should-Retry": "false"},
  429: {"Retry-After": "1"},
  503: {"Retry-After": "5"},
}
CODES = {  # what the package refuses, as OpenAI names it
  QueueFull: (429, "queue_full"),
  TooLong: (400, "context_length_exceeded"),
}
F = TypeVar("F", bound=Fields)
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
  """What is refused.

  Attributes:
    body: bytes of a request's body.
    clients: requests that are open at once.
    seconds: from a request's first byte to its answer's last.
  """

  body: int = 2**20
  clients: int = 256
  seconds: float = 300.0


class Refused(HTTPException):
  """An error that the client gets, as OpenAI writes them."""

  def __init__(
    self,
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
  ) -> None:
    super().__init__(status, message, HEADERS.get(status))
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    fields = {"message": message, "type": kind, "param": param, "code": code}
    self.object = {"error": fields}
    self.response = JSONResponse(self.object, status, self.headers)


@dataclass(eq=False, repr=False)  # which would show the token
class Service:
  """An application that a server such as uvicorn runs.

  Attributes:
    bank: of the adapters that may be named.
    base: the name by which the base alone is asked.
    rows: of a bank that writes; it steps in a thread of the application.
    template: what messages are put into; None: what the adapter was trained
      with, else the tokenizer's chat template.
    token: what clients have to bring; None: nothing.
    limits: what is refused.
    folders: below which adapters may be loaded; none: nowhere.
    load: reads an adapter's folder.
    on_failure: called where the scheduler fails, and nothing can be answered
      any more.
    failed: whether it has.

  Raises:
    UserError: an adapter has the base's name.
  """

  bank: AdapterBank
  _: KW_ONLY
  base: str
  rows: Rows | None = None
  template: str | None = None
  token: str | None = None
  limits: Limits = Limits()
  folders: Sequence[Path] = ()
  load: Callable[[Path], SavedAdapter] = load_adapter
  on_failure: Callable[[], None] = lambda: None
  failed: bool = field(default=False, init=False)

  def __post_init__(self) -> None:
    if self.base in self.bank:
      raise UserError(
        f"An adapter and the base have the same name, {self.base!r}: give the"
        " base another (--name)."
      )
    self.folders = [folder.resolve() for folder in self.folders]
    self._began = int(time.time())
    self._tokenizing = threading.Lock()  # a tokenizer is one thread's
    self._open: set[_Call] = set()
    self._stop = threading.Event()
    self._loop: asyncio.AbstractEventLoop | None = None

    def post(path: str, answer: Callable[..., Any], **form: Any) -> Route:
      return Route(path, partial(answer, **form), methods=["POST"])

    self._routes = Starlette(
      routes=[
        Route(HEALTH, self.health),
        Route("/v1/models", self.models),
        Route("/v1/models/{name:path}", self.model),
        post("/v1/completions", self.write, form=Completion),
        post("/v1/chat/completions", self.write, form=Chat),
        post("/v1/classify", self.classify),
        post("/v1/load_lora_adapter", self.change, form=Load),
        post("/v1/unload_lora_adapter", self.change, form=Unload),
      ],
      exception_handlers={
        HTTPException: _refuse,
        UserError: _refuse,
        Exception: _refuse,
        ClientDisconnect: lambda *_: Response(status_code=GONE),
      },
      lifespan=self._running,
    )

  def give_up(self) -> None:
    """Ends all answers that are being written, with an error for each."""
    self._stop.set()
    for call in list(self._open):
      call.close()

  def give_up_after(self, seconds: float) -> None:
    """The same in some time; a handler of signals may call this."""
    if loop := self._loop:
      loop.call_soon_threadsafe(loop.call_later, seconds, self.give_up)

  @asynccontextmanager
  async def _running(self, app: Starlette) -> AsyncIterator[None]:
    """The scheduler's thread, as long as the application runs."""
    self._loop = asyncio.get_running_loop()
    thread = threading.Thread(target=self._step, name="rows")
    thread.start()
    try:
      yield
    finally:
      self.give_up()
      await run_in_threadpool(thread.join)

  def _step(self) -> None:
    try:
      if self.rows is not None:
        self.rows.run(self._stop)
    except Exception:  # those who wait have an error
      self.failed = True
      log.exception("The scheduler failed: nothing is answered any more.")
      self.on_failure()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """What holds for every request: its token, its time, a line of log."""
    if scope["type"] != "http":  # the server's start and end
      await self._routes(scope, receive, send)
      return
    began = time.monotonic()
    call = scope["call"] = _Call()

    async def watched(message: Message) -> None:
      if message["type"] == "http.response.start":
        call.status = message["status"]
      await send(message)

    self._open.add(call)
    try:
      async with asyncio.timeout(self.limits.seconds) as within:
        refused = self._refused(scope["path"], Headers(scope=scope))
        answer = refused.response if refused else self._routes
        await answer(scope, receive, watched)
    except TimeoutError:
      if not within.expired():
        raise
      late = Refused(
        408, f"It took longer than {self.limits.seconds:g} seconds.", "timeout"
      )
      if not call.status:
        await late.response(scope, receive, watched)
      else:  # a stream; whoever doesn't read it gets no more
        body = _event(late.object).encode()
        with suppress(TimeoutError):
          async with asyncio.timeout(1.0):
            await send({"type": "http.response.body", "body": body})
    finally:
      call.close()
      self._open.discard(call)
      client = (scope.get("client") or "-")[0]
      path = printable(scope["path"])[:80]
      left = call.left and call.status == 200
      status = GONE if left else call.status or GONE
      waited = max((ticket.waited for ticket in call.tickets), default=0.0)
      seconds = time.monotonic() - began
      # what was asked and answered is not in it
      log.info(
        f"{client} {scope['method']} {path} {status}"
        f" model={printable(call.model)} in={call.asked} out={call.answered}"
        f" waited={waited:.3f}s {seconds:.3f}s"
      )

  def _refused(self, path: str, headers: Headers) -> Refused | None:
    """What is wrong with a request whatever it asks for."""
    if path == HEALTH:
      return None
    if self.token is None:
      # A page of the web may have given its own name this machine's address.
      host = headers.get("host", "")
      if not LOCAL & {host, host.rpartition(":")[0]}:
        return Refused(403, "Without a token only this machine is answered.")
    else:
      brought = headers.get("authorization", "").encode()
      if not hmac.compare_digest(brought, f"Bearer {self.token}".encode()):
        return Refused(
          401,
          "The token is missing or wrong: Authorization: Bearer TOKEN.",
          "invalid_api_key",
        )
    if len(self._open) > self.limits.clients:
      text = "Too many requests are open at once; ask again later."
      return Refused(429, text, "too_many_clients")
    return None

  # What is asked for.

  async def health(self, request: HttpRequest) -> Response:
    """GET /healthz, without a token."""
    rows, ends = self.rows, self.failed or self._stop.is_set()
    waits = {"running": rows.running, "waiting": rows.waiting} if rows else {}
    status = {"status": "ends" if ends else "ok", **waits}
    return JSONResponse(status, 503 if ends else 200)

  async def models(self, request: HttpRequest) -> Response:
    """GET /v1/models: the base, where it answers, and all adapters."""
    names = [self.base] if self.rows else []
    names += await run_in_threadpool(list, self.bank)  # it may wait for a lock
    data = list(map(self._described, names))
    return JSONResponse({"object": "list", "data": data})

  async def model(self, request: HttpRequest) -> Response:
    """GET /v1/models/NAME."""
    name = request.path_params["name"]
    await run_in_threadpool(self._held, name)
    return JSONResponse(self._described(name))

  def _described(self, name: str) -> dict[str, Any]:
    return {
      "id": name,
      "object": "model",
      "created": self._began,
      "owned_by": "vera_jax",
      "root": self.base,
      "parent": None if name == self.base else self.base,
    }

  async def write(
    self, request: HttpRequest, *, form: type[Completion] | type[Chat]
  ) -> Response:
    """POST /v1/completions and /v1/chat/completions: the answer to each
    prompt, at once or as it is written."""
    body = await self._body(request, form)
    call: _Call = request.scope["call"]
    if self.rows is None:
      raise Refused(400, "The models here classify: ask /v1/classify.")

    def encoded() -> tuple[Held, list[list[int]]]:
      held = self._held(body.model)
      with self._tokenizing:
        return held, self._encoded(body, held.owner.about)

    held, prompts = await run_in_threadpool(encoded)
    call.model, call.asked = body.model, sum(map(len, prompts))
    if self._stop.is_set() or self.failed:
      raise _ends()
    client = request.client.host if request.client else ""
    requests = [as_request(body, x, held, client) for x in prompts]
    call.submit(self.rows, requests)
    answer = _Answer(body, self.bank.generator.tokenizer.decode, call)
    if body.stream:
      never = {"Cache-Control": "no-cache"}
      events = answer.events()
      return StreamingResponse(events, 200, never, "text/event-stream")
    return JSONResponse(await _unless_gone(request, answer.whole()))

  def _encoded(
    self, body: Completion | Chat, about: dict[str, Any]
  ) -> list[list[int]]:
    """The prompts' tokens, in the form that an adapter was trained on."""
    generator = self.bank.generator
    if isinstance(body, Completion):
      prompts: Any = body.prompt
      if not isinstance(prompts[0], str):
        return prompts
      plain = partial(generator.encode, about={**about, "template": PLAIN})
      return [plain(prompt, max_new_tokens=1) for prompt in prompts]
    tokenizer = generator.tokenizer
    template = self.template or about.get("template")
    if not template and not tokenizer.chat_template:
      raise Refused(
        400,
        f"{body.model} was not trained to answer messages: ask it by"
        " /v1/completions to continue a text.",
      )
    messages = [message.written for message in body.messages]
    return [conversation_ids(tokenizer, messages, template=template or CHAT)]

  async def classify(self, request: HttpRequest) -> Response:
    """POST /v1/classify, by adapters that classify."""
    body = await self._body(request, Classification)

    def ask() -> tuple[Sequence[str], list[Answer]]:
      first: list[Any]
      first, second = body.columns
      with self.bank.lock:  # labels and answers are one adapter's
        owner = self._held(body.model).owner
        if owner.family.reads == IMAGES:
          first = list(map(_image, first))
        answers = self.bank.answers(first, second, adapters=body.model)
      return owner.labels, answers

    labels, answers = await _unless_gone(request, run_in_threadpool(ask))
    request.scope["call"].model = body.model
    data = [
      {
        "index": index,
        "label": answer.label or None,  # none of a regression
        "labels": answer.labels,  # where several may apply
        "score": answer.score,
        "probs": answer.probabilities,
        "num_classes": len(answer.probabilities),
      }
      for index, answer in enumerate(answers)
    ]
    head = _head("classify", "list", body.model)
    return JSONResponse({**head, "classes": labels, "data": data})

  async def change(
    self, request: HttpRequest, *, form: type[Load] | type[Unload]
  ) -> Response:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter; what an adapter
    is writing is finished."""
    if not self.folders:
      raise Refused(
        403, "Adapters can't be loaded here: see --allow_loading.", "off"
      )
    body = await self._body(request, form)
    name = request.scope["call"].model = body.lora_name
    if name == self.base:
      raise Refused(
        400, "The base has this name, and stays.", None, "lora_name"
      )

    def load() -> None:
      assert isinstance(body, Load)
      adapter = self.load(self._below(body.lora_path))
      with self.bank.lock:
        there = body.load_inplace and name in self.bank
        put = self.bank.replace if there else self.bank.add
        put(name, adapter)

    def unload() -> None:
      with self.bank.lock:
        self._held(name)
        self.bank.remove(name)

    done, work = ("loaded", load) if form is Load else ("unloaded", unload)
    await run_in_threadpool(work)
    return JSONResponse({done: name})

  # What these have in common.

  async def _body(self, request: HttpRequest, form: type[F]) -> F:
    """A request's body, of this form."""
    # Of another type a page of the web could have it sent by its reader.
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
      raise Refused(415, "The body is JSON: Content-Type: application/json.")
    data, most = bytearray(), self.limits.body
    async for chunk in request.stream():
      data += chunk
      if len(data) > most:
        text = f"A body has at most {most:,} bytes here."
        raise Refused(413, text, "request_too_large")
    try:
      return form.model_validate_json(bytes(data))
    except ValidationError as error:
      raise _misfit(error) from None  # whose text has what was sent

  def _held(self, name: str) -> Held:
    """The adapter of a name, or the base; what it answers, it answers whole."""
    if name == self.base and self.rows is not None:
      return self.bank.held(None)
    if name in self.bank:
      return self.bank.held(name)
    names = [self.base, *self.bank]
    near = ", ".join(difflib.get_close_matches(name, names, 5, 0.5))
    hint = f" The nearest names: {near}." if near else ""
    if name == self.base:
      hint = " It is a base that answers only with an adapter."
    text = f"There is no model {printable(name)!r}.{hint}"
    raise Refused(404, text, "model_not_found", "model")

  def _below(self, name: str) -> Path:
    """An adapter's folder, if it lies below those from which may be loaded.

    Links are followed before that is asked.
    """
    for root in self.folders:
      folder = (root / name).resolve()
      if folder.is_relative_to(root) and folder != root and folder.is_dir():
        return folder
    text = "lora_path names no folder below those that adapters come from."
    raise Refused(400, text, None, "lora_path")


@dataclass(eq=False)
class _Call:
  """A request while it is open.

  Attributes:
    status: of the answer; 0 before it begins.
    model: which is asked.
    asked, answered: tokens of prompts and answers.
    tickets: of its prompts.
    left: how many of them haven't ended.
  """

  status: int = 0
  model: str = "-"
  asked: int = 0
  answered: int = 0
  tickets: list[Ticket] = field(default_factory=list)
  left: int = 0
  _rows: Rows | None = None
  _queue: asyncio.Queue[tuple[int, Token]] = field(
    default_factory=asyncio.Queue
  )

  def submit(self, rows: Rows, requests: Sequence[Request]) -> None:
    """Asks the scheduler; where it doesn't take one, `close` ends the others.

    Raises:
      UserError: as for `Rows.submit`.
    """
    loop = asyncio.get_running_loop()
    self._rows, self.left = rows, len(requests)

    def put(number: int, token: Token) -> None:  # in the scheduler's thread
      loop.call_soon_threadsafe(self._queue.put_nowait, (number, token))

    for number, request in enumerate(requests):
      self.tickets.append(rows.submit(request, partial(put, number)))

  async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
    """Each token, with its prompt's number, as the scheduler writes it."""
    while self.left:
      number, token = await self._queue.get()
      if token.finish == CANCELLED:  # by `give_up`: the client is still there
        raise _ends()
      if token.finish == ERROR:
        raise Refused(500, self.tickets[number].error)
      self.answered += 1
      self.left -= token.finish is not None
      yield number, token

  def close(self) -> None:
    """Gives up what has not ended; its rows are free at the next step."""
    for ticket in self.tickets:
      assert self._rows is not None
      self._rows.cancel(ticket)


class _Answer:
  """An answer as OpenAI writes it, to a chat or a completion."""

  def __init__(
    self,
    body: Completion | Chat,
    decode: Callable[[list[int]], str],
    call: _Call,
  ) -> None:
    self._body, self._decode, self._call = body, decode, call
    self._is_chat = isinstance(body, Chat)
    kind = "chat.completion" if self._is_chat else "text_completion"
    kind += ".chunk" if self._is_chat and body.stream else ""
    prefix = "chatcmpl" if self._is_chat else "cmpl"
    self._head = _head(prefix, kind, body.model)
    self._written: dict[int, int] = defaultdict(int)  # characters

  async def whole(self) -> dict[str, Any]:
    """All at once."""
    answers: list[list[Token]] = [[] for _ in self._call.tickets]
    async for number, token in self._call.tokens():
      answers[number].append(token)
    choices = [self._choice(*answer) for answer in enumerate(answers)]
    return {**self._head, "choices": choices, "usage": self._usage()}

  async def events(self) -> AsyncIterator[str]:
    """The same in parts, as a stream of events."""
    count = self._body.stream_options.include_usage
    head = self._head | ({"usage": None} if count else {})
    logprobs = self._body.alternatives is not None
    if self._is_chat:
      role = {"role": "assistant", "content": ""}
      choice = {"index": 0, "delta": role, "finish_reason": None}
      yield _event({**head, "choices": [choice]})
    try:
      async for number, token in self._call.tokens():
        if token.text or token.finish or logprobs:
          choices = [self._choice(number, [token])]
          yield _event({**head, "choices": choices})
      if count:
        yield _event({**head, "choices": [], "usage": self._usage()})
      yield "data: [DONE]\n\n"
    except Refused as error:
      yield _event(error.object)

  def _choice(self, number: int, tokens: Sequence[Token]) -> dict[str, Any]:
    text = "".join(token.text for token in tokens)
    content: dict[str, Any] = {"text": text}
    if self._is_chat and self._body.stream:
      content = {"delta": {"content": text} if text else {}}
    elif self._is_chat:
      content = {"message": {"role": "assistant", "content": text}}
    return {
      "index": number,
      **content,
      "logprobs": self._logprobs(number, tokens),
      "finish_reason": tokens[-1].finish,
    }

  def _logprobs(
    self, number: int, tokens: Sequence[Token]
  ) -> dict[str, Any] | None:
    if self._body.alternatives is None:
      return None
    if self._is_chat:
      content = [
        self._token(token.id, token.logprob)
        | {"top_logprobs": [self._token(*other) for other in token.top]}
        for token in tokens
      ]
      return {"content": content}
    offsets = []
    for token in tokens:
      offsets.append(self._written[number])
      self._written[number] += len(token.text)
    return {
      "tokens": [self._decode([token.id]) for token in tokens],
      "token_logprobs": [_at_least(token.logprob) for token in tokens],
      "top_logprobs": [
        {self._decode([i]): _at_least(logprob) for i, logprob in token.top}
        for token in tokens
      ],
      "text_offset": offsets,
    }

  def _token(self, number: int, logprob: float | None) -> dict[str, Any]:
    text = self._decode([number])
    coded = None if BROKEN in text else list(text.encode())
    return {"token": text, "logprob": _at_least(logprob), "bytes": coded}

  def _usage(self) -> dict[str, int]:
    asked, answered = self._call.asked, self._call.answered
    return {
      "prompt_tokens": asked,
      "completion_tokens": answered,
      "total_tokens": asked + answered,
    }


def _refuse(request: HttpRequest, error: Exception) -> Response:
  """The answer to a request that led to an error."""
  match error:
    case Refused():
      return error.response
    case UserError():
      status, code = CODES.get(type(error), (400, None))
      return Refused(status, str(error), code).response
    case HTTPException():
      what = f"{request.method} {request.url.path}"
      return Refused(error.status_code, f"{what}: {error.detail}.").response
  return Refused(500, "The server failed; its log says how.").response


def _ends() -> Refused:
  return Refused(503, "The server ends.")


def _misfit(error: ValidationError) -> Refused:
  """What is wrong with a body, without what it says."""
  wrong = error.errors(include_url=False, include_input=False)
  place = wrong[0]["loc"]
  field = ".".join(map(str, place[:1]))
  same = [x["msg"] for x in wrong if x["loc"][:1] == place[:1]]
  what = "; or: ".join(dict.fromkeys(same)).replace("Value error, ", "")
  if wrong[0]["type"] == "extra_forbidden":
    field = ".".join(map(str, place))
    what = "this field is not known here: leave it out"
  return Refused(400, f"{field}: {what}." if field else what, None, field)


async def _unless_gone(request: HttpRequest, work: Awaitable[T]) -> T:
  """What the work gives; it is cancelled where the client goes away."""

  async def gone() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  left, task = asyncio.ensure_future(gone()), asyncio.ensure_future(work)
  try:
    await asyncio.wait({left, task}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientDisconnect
    return task.result()
  finally:
    left.cancel()
    task.cancel()


def _image(text: str) -> bytes:
  """The bytes of an image in base64, or of data:image/png;base64,..."""
  try:
    return base64.b64decode(text.rpartition(",")[2], validate=True)
  except ValueError as error:
    raise Refused(400, "An image is no base64.", None, "input") from error


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
  return {
    "id": f"{prefix}-{uuid.uuid4().hex}",
    "object": kind,
    "created": int(time.time()),
    "model": model,
  }


def _event(value: dict[str, Any]) -> str:
  return f"data: {json_line(value)}\n\n"


def _at_least(logprob: float | None) -> float | None:
  """JSON has no infinite numbers; OpenAI writes -9999 for what can't come."""
  return None if logprob is None else max(logprob, -9999.0)
