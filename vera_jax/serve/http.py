"""A bank's answers over HTTP, in the words of OpenAI's and vLLM's interfaces.

  app = Service(bank, base="smollm2", rows=Rows(bank)).application()
  uvicorn.run(app)

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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vera_jax.adapters.files import SavedAdapter, load_adapter
from vera_jax.data.completions import Completions, prompt_ids
from vera_jax.data.templates import CHAT
from vera_jax.errors import UserError
from vera_jax.generate.conversation import conversation_ids
from vera_jax.generate.text_pieces import BROKEN
from vera_jax.models.family import IMAGES
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.bodies import (
  Chat,
  Classification,
  Completion,
  Fields,
  Load,
  Unload,
)
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
LOCAL = ("127.0.0.1", "localhost", "[::1]")  # names of this machine
STREAM = "text/event-stream"
F = TypeVar("F", bound=Fields)
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
  """What is refused.

  Attributes:
    body: bytes of a request's body.
    texts: prompts, or texts to classify, in one request.
    clients: requests that are open at once.
    seconds: from a request's first byte to its answer's last.
  """

  body: int = 2**20
  texts: int = 256
  clients: int = 256
  seconds: float = 300.0


class Refused(Exception):
  """An error that the client gets, as OpenAI writes them."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    **headers: str,
  ) -> None:
    super().__init__(message)
    self.status = status
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
      kind = "rate_limit_error"
    fields = {"message": message, "type": kind, "param": param, "code": code}
    self.object = {"error": fields}
    self.headers = headers

  def response(self) -> JSONResponse:
    return JSONResponse(self.object, self.status, headers=self.headers)


class Service:
  """What the server knows, and what it does at each address."""

  def __init__(
    self,
    bank: AdapterBank,
    *,
    base: str,
    rows: Rows | None = None,
    template: str | None = None,
    token: str | None = None,
    limits: Limits | None = None,
    folders: Sequence[Path] = (),
    load: Callable[[Path], SavedAdapter] = load_adapter,
    on_failure: Callable[[], None] = lambda: None,
  ) -> None:
    """A service; `application` makes it known to a server.

    Args:
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

    Raises:
      UserError: an adapter has the base's name.
    """
    if base in bank:
      raise UserError(
        f"An adapter and the base have the same name, {base!r}: give the base"
        " another (--name)."
      )
    self.bank, self.base, self.rows = bank, base, rows
    self.template = template
    self.limits = limits or Limits()
    self.folders = [folder.resolve() for folder in folders]
    self.began = int(time.time())
    self.token, self._read_adapter, self._on_failure = token, load, on_failure
    self._loading = threading.Lock()  # one load or removal at a time
    self._tokenizing = threading.Lock()  # a tokenizer is one thread's
    self._open: set[_Answers] = set()
    self._stop = threading.Event()
    self._loop: asyncio.AbstractEventLoop | None = None
    self.failed = False  # the scheduler

  def application(self) -> ASGIApp:
    """What a server such as uvicorn takes."""
    post, get = ["POST"], ["GET"]
    app = Starlette(
      routes=[
        Route(HEALTH, self.health, methods=get),
        Route("/v1/models", self.models, methods=get),
        Route("/v1/models/{name:path}", self.model, methods=get),
        Route("/v1/completions", self.complete, methods=post),
        Route("/v1/chat/completions", self.chat, methods=post),
        Route("/v1/classify", self.classify, methods=post),
        Route("/v1/load_lora_adapter", self.load, methods=post),
        Route("/v1/unload_lora_adapter", self.unload, methods=post),
      ],
      exception_handlers={
        Refused: _refuse,
        UserError: _refuse,
        HTTPException: _refuse,
        Exception: _refuse,
        ClientDisconnect: lambda *_: Response(status_code=GONE),
      },
      lifespan=self._running,
    )
    return _Guard(app, self)

  def give_up(self) -> None:
    """Ends all answers that are being written, with an error for each."""
    self._stop.set()
    for answers in list(self._open):
      answers.close()

  def give_up_after(self, seconds: float) -> None:
    """The same in some time; a handler of signals may call this."""
    if loop := self._loop:
      loop.call_soon_threadsafe(loop.call_later, seconds, self.give_up)

  @asynccontextmanager
  async def _running(self, app: Starlette) -> AsyncIterator[None]:
    """The scheduler's thread, as long as the application runs."""
    self._loop = asyncio.get_running_loop()
    if self.rows is None:
      yield
      return
    thread = threading.Thread(target=self._step, args=[self.rows], name="rows")
    thread.start()
    try:
      yield
    finally:
      self.give_up()
      await run_in_threadpool(thread.join)

  def _step(self, rows: Rows) -> None:
    try:
      rows.run(self._stop)
    except Exception:  # those who wait have an error
      self.failed = True
      log.exception("The scheduler failed: nothing is answered any more.")
      self._on_failure()

  # What is asked for.

  async def health(self, request: HttpRequest) -> Response:
    """GET /healthz, without a token."""
    rows = self.rows
    waits = {"running": rows.running, "waiting": rows.waiting} if rows else {}
    if self.failed or self._stop.is_set():
      return JSONResponse({"status": "ends", **waits}, 503)
    return JSONResponse({"status": "ok", **waits})

  async def models(self, request: HttpRequest) -> Response:
    """GET /v1/models: the base, where it answers, and all adapters."""
    names = [self.base] if self.rows else []
    names += await run_in_threadpool(list, self.bank)  # it may wait for a lock
    data = [self._described(name) for name in names]
    return JSONResponse({"object": "list", "data": data})

  async def model(self, request: HttpRequest) -> Response:
    """GET /v1/models/NAME."""
    name = request.path_params["name"]
    await self._adapter(request, name)
    return JSONResponse(self._described(name))

  def _described(self, name: str) -> dict[str, Any]:
    is_base = name == self.base
    return {
      "id": name,
      "object": "model",
      "created": self.began,
      "owned_by": "vera_jax",
      "root": self.base,
      "parent": None if is_base else self.base,
    }

  async def complete(self, request: HttpRequest) -> Response:
    """POST /v1/completions."""
    body = await self._body(request, Completion)
    prompts = body.prompts
    self._check_texts(prompts, "prompt")

    def encoded(about: dict[str, Any]) -> list[list[int]]:
      texts: Any = prompts
      if not isinstance(prompts[0], str):
        return texts
      how = Completions("left", about.get("separate") is True)
      return prompt_ids(self.bank.generator.tokenizer, texts, how=how)

    return await self._write(request, body, encoded)

  async def chat(self, request: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    body = await self._body(request, Chat)
    messages = [message.written for message in body.messages]

    def encoded(about: dict[str, Any]) -> list[list[int]]:
      tokenizer = self.bank.generator.tokenizer
      template = self.template or about.get("template")
      if not template and not tokenizer.chat_template:
        raise Refused(
          400,
          f"{body.model} was not trained to answer messages: ask it by"
          " /v1/completions to continue a text.",
          param="model",
        )
      template = template or CHAT
      turns = [message["role"] for message in messages]
      by_turns = (["user", "assistant"] * len(turns))[: len(turns)]
      if template != CHAT and (turns != by_turns or turns[-1] != "user"):
        raise Refused(
          400,
          f"In the form {template} there are messages of user and assistant by"
          " turns, the last one the user's.",
          param="messages",
        )
      return [conversation_ids(tokenizer, messages, template=template)]

    return await self._write(request, body, encoded)

  async def classify(self, request: HttpRequest) -> Response:
    """POST /v1/classify, by adapters that classify."""
    body = await self._body(request, Classification)
    if self.rows is not None:
      raise Refused(400, "The models here write texts and classify none.")
    adapter = await self._adapter(request, body.model)
    texts: Any = [body.input] if isinstance(body.input, str) else body.input
    self._check_texts(texts, "input")

    def ask() -> tuple[Sequence[str], Sequence[Any]]:
      first, second = texts, None
      if isinstance(texts[0], list):
        if not all(len(pair) == 2 for pair in texts):
          raise Refused(400, "A pair has two texts.", param="input")
        first, second = map(list, zip(*texts, strict=True))
      while True:  # again, if it was replaced meanwhile: labels are one's own
        held = self.bank.held(adapter)
        if held.owner.family.reads == IMAGES:
          first = [_image(text) for text in texts]
        answers = self.bank.answers(first, second, adapters=str(adapter))
        if self.bank.held(adapter) is held:
          return held.owner.labels, answers

    labels, answers = await _unless_gone(request, run_in_threadpool(ask))
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
    return JSONResponse(
      {**_head("classify", "list", body.model), "classes": labels, "data": data}
    )

  async def load(self, request: HttpRequest) -> Response:
    """POST /v1/load_lora_adapter."""
    self._check_loading()
    body = await self._body(request, Load)
    if body.lora_name == self.base or not body.lora_name.isprintable():
      raise Refused(
        400, "The base has this name, or it can't be shown.", param="lora_name"
      )

    def change() -> None:
      folder = self._below(body.lora_path)
      with self._loading:
        there = body.lora_name in self.bank
        if there and not body.load_inplace:
          raise Refused(
            400,
            f"There is an adapter {body.lora_name} already: unload it, or"
            " replace it by load_inplace.",
            param="lora_name",
          )
        change = self.bank.replace if there else self.bank.add
        change(body.lora_name, self._read_adapter(folder))

    await run_in_threadpool(change)
    request.scope["logged"]["model"] = body.lora_name
    return JSONResponse({"loaded": body.lora_name})

  async def unload(self, request: HttpRequest) -> Response:
    """POST /v1/unload_lora_adapter; what it is writing is finished."""
    self._check_loading()
    body = await self._body(request, Unload)
    adapter = await self._adapter(request, body.lora_name)
    if adapter is None:
      raise Refused(400, "The base can't be unloaded.", param="lora_name")

    def remove() -> None:
      with self._loading:
        self.bank.remove(adapter)

    await run_in_threadpool(remove)
    return JSONResponse({"unloaded": adapter})

  # What these have in common.

  async def _body(self, request: HttpRequest, form: type[F]) -> F:
    """A request's body, of this form."""
    # Of another type a page of the web could have it sent by its reader.
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() != "application/json":
      raise Refused(415, "The body is JSON: Content-Type: application/json.")
    data = bytearray()
    async for chunk in request.stream():
      data += chunk
      if len(data) > self.limits.body:
        raise Refused(
          413,
          f"A body has at most {self.limits.body:,} bytes here.",
          code="request_too_large",
        )
    try:
      return form.model_validate_json(bytes(data))
    except ValidationError as error:
      raise _misfit(error) from None  # whose text has what was sent

  def _check_texts(self, texts: Sequence[Any], param: str) -> None:
    if not 1 <= len(texts) <= self.limits.texts:
      raise Refused(
        400,
        f"{param} has {len(texts)} texts; give 1 to {self.limits.texts}.",
        param=param,
      )

  async def _adapter(self, request: HttpRequest, name: str) -> str | None:
    """The adapter of a name; None for the base."""
    if name in self.bank:
      request.scope["logged"]["model"] = name
      return name
    if name == self.base and self.rows is not None:
      request.scope["logged"]["model"] = name
      return None

    def nearest() -> list[str]:
      names = [self.base, *self.bank]
      return difflib.get_close_matches(name, names, 5, 0.5)

    near = await run_in_threadpool(nearest)
    hint = f" The nearest names: {', '.join(near)}." if near else ""
    if name == self.base:
      hint = " It is a base that answers only with an adapter."
    raise Refused(
      404,
      f"There is no model {printable(name)!r}.{hint}",
      code="model_not_found",
      param="model",
    )

  def _check_loading(self) -> None:
    if not self.folders:
      raise Refused(
        403, "Adapters can't be loaded here: see --allow_loading.", code="off"
      )

  def _below(self, name: str) -> Path:
    """An adapter's folder, if it lies below those from which may be loaded.

    Links are followed before that is asked.
    """
    for root in self.folders if name.isprintable() else ():
      folder = (root / name).resolve()
      if folder.is_relative_to(root) and folder != root and folder.is_dir():
        return folder
    raise Refused(
      400,
      "lora_path names no folder below those that adapters come from.",
      param="lora_path",
    )

  async def _write(
    self,
    request: HttpRequest,
    body: Completion | Chat,
    encode: Callable[[dict[str, Any]], list[list[int]]],
  ) -> Response:
    """The answer to each prompt, at once or as it is written."""
    rows = self.rows
    if rows is None:
      raise Refused(400, "The models here classify: ask /v1/classify.")
    adapter = await self._adapter(request, body.model)
    logged = request.scope["logged"]
    while True:
      held = self.bank.held(adapter)
      about = held.owner.about
      prompts = await run_in_threadpool(self._encoded, encode, about)
      requests = [
        self._request(request, body, adapter, prompt, rows.length)
        for prompt in prompts
      ]
      logged["prompt_tokens"] = sum(map(len, prompts))
      if self._stop.is_set() or self.failed:
        raise _ends()
      answers = _Answers(rows, requests, logged)
      if all(ticket.adapter is held for ticket in answers.tickets):
        break
      answers.close()  # replaced meanwhile: it may want another form of prompts
    self._open.add(answers)
    answers.closed = partial(self._open.discard, answers)
    form = _Form(body, self.bank.generator.tokenizer.decode, logged)
    if body.stream:
      return _Stream(answers, form.events(answers))
    whole: list[list[Token]] = [[] for _ in prompts]

    async def collect() -> None:
      async for number, token in answers:
        whole[number].append(token)

    try:
      await _unless_gone(request, collect())
    finally:
      answers.close()
    return JSONResponse(form.whole(whole))

  def _encoded(
    self, encode: Callable[[Any], list[list[int]]], about: dict[str, Any]
  ) -> list[list[int]]:
    with self._tokenizing:
      return encode(about)

  def _request(
    self,
    request: HttpRequest,
    body: Completion | Chat,
    adapter: str | None,
    prompt: Sequence[int],
    length: int,
  ) -> Request:
    """What the scheduler is asked for."""
    room = length - len(prompt)
    most = body.max_tokens or max(room, 1)
    if most > room:
      raise Refused(
        400,
        f"The prompt has {len(prompt)} tokens and {most} may be written; both"
        f" together are at most {length} here.",
        code="context_length_exceeded",
        param="messages" if isinstance(body, Chat) else "prompt",
      )
    return Request(
      tuple(prompt),
      adapter,
      body.how,
      most,
      body.stops,
      body.drawn_by,
      body.alternatives,
      request.client.host if request.client else "",
    )


class _Answers:
  """The tokens of some requests, as the scheduler writes them."""

  def __init__(
    self, rows: Rows, requests: Sequence[Request], logged: dict[str, Any]
  ) -> None:
    """Submits the requests: all are taken, or none is.

    Raises:
      UserError: as for `Rows.submit`.
    """
    self.tickets: list[Ticket] = []
    self.closed: Callable[[], None] = lambda: None
    self._rows, self._logged = rows, logged
    self._loop = asyncio.get_running_loop()
    self._queue: asyncio.Queue[tuple[int, Token]] = asyncio.Queue()
    logged.update(answer_tokens=0, left=len(requests))
    try:
      for number, request in enumerate(requests):
        put = partial(self._put, number)
        self.tickets.append(rows.submit(request, put))
    except BaseException:
      self.close()
      raise

  def _put(self, number: int, token: Token) -> None:
    """Called in the scheduler's thread."""
    self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, token))

  async def __aiter__(self) -> AsyncIterator[tuple[int, Token]]:
    while self._logged["left"]:
      number, token = await self._queue.get()
      if token.finish == CANCELLED:  # by `give_up`: the client is still there
        raise _ends()
      if token.finish == ERROR:
        raise Refused(500, self.tickets[number].error)
      self._logged["answer_tokens"] += 1
      self._logged["left"] -= token.finish is not None
      yield number, token

  def close(self) -> None:
    """Gives up what has not ended; its rows are free at the next step."""
    for ticket in self.tickets:
      self._rows.cancel(ticket)
    self.closed()


class _Stream(StreamingResponse):
  """Events, and an end of the answers behind them also if nobody listens."""

  def __init__(self, answers: _Answers, events: AsyncIterator[str]) -> None:
    super().__init__(events, media_type=STREAM)
    self.headers["Cache-Control"] = "no-cache"
    self._answers = answers

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._answers.close()


class _Form:
  """Answers as OpenAI writes them, those of chats and of completions."""

  def __init__(
    self,
    body: Completion | Chat,
    decode: Callable[[list[int]], str],
    logged: dict[str, Any],
  ) -> None:
    self._is_chat, self._model = isinstance(body, Chat), body.model
    self._alternatives = body.alternatives
    self._count = body.stream_options.include_usage
    self._decode, self._logged = decode, logged
    self._written: dict[int, int] = {}  # characters of each answer

  def whole(self, answers: Sequence[Sequence[Token]]) -> dict[str, Any]:
    """All answers."""
    kind = "chat.completion" if self._is_chat else "text_completion"
    choices = [self._choice(*answer) for answer in enumerate(answers)]
    head = _head("chatcmpl" if self._is_chat else "cmpl", kind, self._model)
    return {**head, "choices": choices, "usage": self._usage()}

  async def events(self, answers: _Answers) -> AsyncIterator[str]:
    """The same in parts, as a stream of events."""
    kind = "chat.completion.chunk" if self._is_chat else "text_completion"
    head = _head("chatcmpl" if self._is_chat else "cmpl", kind, self._model)
    head |= {"usage": None} if self._count else {}
    if self._is_chat:
      role = {"role": "assistant", "content": ""}
      choice = {"index": 0, "delta": role, "finish_reason": None}
      yield _event({**head, "choices": [choice]})
    try:
      async for number, token in answers:
        if token.text or token.finish or self._alternatives is not None:
          choice = self._choice(number, [token], streamed=True)
          yield _event({**head, "choices": [choice]})
      if self._count:
        yield _event({**head, "choices": [], "usage": self._usage()})
      yield "data: [DONE]\n\n"
    except Refused as error:
      yield _event(error.object)

  def _choice(
    self, number: int, tokens: Sequence[Token], *, streamed: bool = False
  ) -> dict[str, Any]:
    text = "".join(token.text for token in tokens)
    content: dict[str, Any] = {"text": text}
    if self._is_chat and streamed:
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
    if self._alternatives is None:
      return None
    if self._is_chat:
      return {
        "content": [
          {
            **self._token(token.id, token.logprob),
            "top_logprobs": [self._token(*other) for other in token.top],
          }
          for token in tokens
        ]
      }
    offsets = []
    for token in tokens:
      offsets.append(self._written.get(number, 0))
      self._written[number] = offsets[-1] + len(token.text)
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
    asked, answered = (
      self._logged["prompt_tokens"],
      self._logged["answer_tokens"],
    )
    return {
      "prompt_tokens": asked,
      "completion_tokens": answered,
      "total_tokens": asked + answered,
    }


class _Guard:
  """What holds for every request: token, number, time, a line of log."""

  def __init__(self, app: ASGIApp, service: Service) -> None:
    self._app, self._service, self._clients = app, service, 0

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":  # the server's start and end
      await self._app(scope, receive, send)
      return
    began, limits = time.monotonic(), self._service.limits
    logged = scope["logged"] = {"status": 0}

    async def watched(message: Message) -> None:
      if message["type"] == "http.response.start":
        logged["status"] = message["status"]
      await send(message)

    self._clients += 1
    try:
      async with asyncio.timeout(limits.seconds) as within:
        if refused := self._refusal(scope):
          await refused.response()(scope, receive, watched)
        else:
          await self._app(scope, receive, watched)
    except TimeoutError:
      if not within.expired():
        raise
      late = Refused(
        408,
        f"It took longer than {limits.seconds:g} seconds.",
        code="timeout",
        **{"X-Should-Retry": "false"},
      )
      if not logged["status"]:
        await late.response()(scope, receive, watched)
      else:  # a stream; whoever doesn't read it gets no more
        body = _event(late.object).encode()
        with suppress(TimeoutError):
          async with asyncio.timeout(1.0):
            await send({"type": "http.response.body", "body": body})
    finally:
      self._clients -= 1
      self._log(scope, time.monotonic() - began)

  def _refusal(self, scope: Scope) -> Refused | None:
    if scope["path"] == HEALTH:
      return None
    headers = dict(scope["headers"])
    token = self._service.token
    if token is None:
      # A page of the web may have given its own name this machine's address.
      host = headers.get(b"host", b"").decode("latin-1")
      if host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
        return Refused(403, "Without a token only this machine is answered.")
    else:
      brought = headers.get(b"authorization", b"")
      wanted = f"Bearer {token}".encode()
      if not hmac.compare_digest(brought, wanted):
        return Refused(
          401,
          "The token is missing or wrong: Authorization: Bearer TOKEN.",
          code="invalid_api_key",
          **{"WWW-Authenticate": "Bearer"},
        )
    if self._clients > self._service.limits.clients:
      return Refused(
        429,
        "Too many requests are open at once; ask again later.",
        code="too_many_clients",
        **{"Retry-After": "1"},
      )
    return None

  def _log(self, scope: Scope, seconds: float) -> None:
    """One line; what was asked and answered is not in it."""
    logged = scope["logged"]
    status = (
      GONE
      if logged.get("left") and logged["status"] == 200
      else logged["status"]
    )
    client = scope["client"][0] if scope.get("client") else "-"
    log.info(
      "%s %s %s %s model=%s in=%s out=%s %.3fs",
      client,
      scope["method"],
      printable(scope["path"])[:80],
      status or GONE,
      printable(logged.get("model", "-")),
      logged.get("prompt_tokens", "-"),
      logged.get("answer_tokens", "-"),
      seconds,
    )


def _refuse(request: HttpRequest, error: Exception) -> Response:
  """The answer to a request that led to an error."""
  match error:
    case Refused():
      return error.response()
    case QueueFull():
      more = {"Retry-After": "1"}
      return Refused(429, str(error), code="queue_full", **more).response()
    case UserError():
      return Refused(400, str(error)).response()
    case HTTPException():
      what = f"{request.method} {request.url.path}"
      return Refused(error.status_code, f"{what}: {error.detail}.").response()
  return Refused(500, "The server failed; its log says how.").response()


def _ends() -> Refused:
  return Refused(503, "The server ends.", **{"Retry-After": "5"})


def _misfit(error: ValidationError) -> Refused:
  """What is wrong with a body, without what it says."""
  wrong = error.errors(include_url=False, include_input=False)
  where = ".".join(map(str, wrong[0]["loc"][:1]))
  same = [x["msg"] for x in wrong if x["loc"][:1] == wrong[0]["loc"][:1]]
  what = "; or: ".join(dict.fromkeys(same)).replace("Value error, ", "")
  if wrong[0]["type"] == "extra_forbidden":
    where = ".".join(map(str, wrong[0]["loc"]))
    what = "this field is not known here: leave it out"
  return Refused(
    400, f"{where}: {what}." if where else what, param=where or None
  )


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
    raise Refused(400, "An image is no base64.", param="input") from error


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
