"""Serve a base and many adapters over HTTP, as OpenAI's clients ask.

  python -m experiments.serve --model=BASE --adapters=FOLDER
  python -m experiments.serve --adapters=FOLDER,owner/name --port=8000
  curl localhost:8000/v1/completions -H 'Content-Type: application/json'
    -d '{"model": "ann", "prompt": "Once upon a time"}'       (in one line)

FOLDER holds adapters, ours or PEFT's, each in a folder of its own, by whose
name it is asked: a request's "model" is the adapter, or --name, the base. An
adapter's own folder or hub id may stand in the list as well. All must be of one
base, one method and one pair A, B; which does not fit is named before anything
is served. A base that classifies answers only with an adapter.

Requests of any adapters share each step of the model. There are /v1/models,
/v1/completions, /v1/chat/completions, /v1/classify and /healthz, and with
--allow_loading /v1/load_lora_adapter and /v1/unload_lora_adapter, which take
folders below FOLDER alone. Standard error has a line for each request, in which
nothing stands of what was asked and answered.

It listens on this machine alone. For --host=0.0.0.0 clients must bring a token,
from --token_file or $VERA_JAX_TOKEN. SIGTERM refuses what is new, finishes what
is running within --grace seconds, and ends.
"""

import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from configs import language
from experiments import cli
from vera_jax.errors import UserError, install
from vera_jax.files import JSON, read_bytes
from vera_jax.places import local_copy
from vera_jax.progress import show_stage
from vera_jax.terminal import Console

if TYPE_CHECKING:
  from vera_jax.adapters.files import SavedAdapter

MODEL = flags.DEFINE_string(
  "model", None, "The base. Unset: what the first adapter names."
)
ADAPTERS = flags.DEFINE_list(
  "adapters", [], "Folders of adapters, adapters' folders, hub ids."
)
NAME = flags.DEFINE_string("name", None, "The base's name for clients.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen on.")
PORT = flags.DEFINE_integer("port", 8000, "0: any that is free.", 0, 65535)
TOKEN_FILE = flags.DEFINE_string(
  "token_file", None, "A file with the token that clients bring."
)
ALLOW_LOADING = flags.DEFINE_bool(
  "allow_loading", False, "Clients may load and unload adapters."
)
CAPACITY = flags.DEFINE_integer(
  "capacity",
  None,
  "The most adapters. Unset: those given, and 64 more with --allow_loading.",
  1,
)
RESIDENT = flags.DEFINE_integer(
  "resident", None, "Those that lie on the device at once. Unset: all.", 1
)
TEMPLATE = flags.DEFINE_enum(
  "template",
  None,
  ["chat", "alpaca", "plain"],
  "What messages are put into. Unset: as an adapter was trained, or the"
  " tokenizer's chat template.",
)
DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of weights and computing."
)
ROWS = flags.DEFINE_integer("rows", 16, "Requests that share a step.", 1)
LENGTH = flags.DEFINE_integer(
  "length", None, "Tokens of prompt and answer. Unset: the model's room.", 2
)
QUEUE = flags.DEFINE_integer("queue", 256, "Requests that may wait.", 0)
PER_CLIENT = flags.DEFINE_integer(
  "per_client", None, "Requests of one address at once. Unset: any number.", 1
)
CLIENTS = flags.DEFINE_integer("clients", 512, "Open requests at once.", 1)
BODY = flags.DEFINE_integer("body", 2**20, "Bytes of a request's body.", 1)
TIMEOUT = flags.DEFINE_float("timeout", 300.0, "Seconds of a request.", 0.0)
GRACE = flags.DEFINE_float(
  "grace", 30.0, "Seconds in which running answers end after SIGTERM.", 0.0
)
MORE = 64  # adapters that have room with --allow_loading
LOCAL = "127.0.0.1", "localhost", "::1"


def main() -> None:
  if not (MODEL.value or ADAPTERS.value):
    raise UserError("Give --model=BASE, --adapters=FOLDER, or both.")
  token = read_token()
  if HOST.value not in LOCAL and token is None:
    raise UserError(
      f"--host={HOST.value} lets other machines in: give a token for them, by"
      " --token_file=FILE or VERA_JAX_TOKEN."
    )
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  places, roots = named_adapters(ADAPTERS.value)
  if ALLOW_LOADING.value and not (roots and places):
    raise UserError(
      "--allow_loading needs --adapters=FOLDER, from which adapters are loaded,"
      " with one or more in it, which says what others must fit."
    )
  try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as error:
    raise UserError(f"Serving needs {install('serve')} ({error}).") from error
  with bound(HOST.value, PORT.value) as address:
    serve(address, places, roots if ALLOW_LOADING.value else [], token)


def serve(
  address: socket.socket,
  places: dict[str, Any],
  roots: list[Path],
  token: str | None,
) -> None:
  """Load, compile, listen; returns when the server has ended.

  Args:
    address: which is listened on.
    places: of adapters, by name.
    roots: below which clients may load more.
    token: what clients have to bring.
  """
  import jax.numpy as jnp
  import uvicorn

  from vera_jax.adapters.files import SavedAdapter
  from vera_jax.hub import public_name
  from vera_jax.models.kinds import WORDS
  from vera_jax.serve.bank import AdapterBank
  from vera_jax.serve.http import Limits, Service
  from vera_jax.serve.rows import Rows

  def load(folder: Path) -> SavedAdapter:
    return cli.load_any_adapter(folder, MODEL.value)

  show_stage("loading the weights")
  adapters: dict[str, Any] = {name: load(x) for name, x in places.items()}
  alone: dict[str, Any] = {}
  if not adapters:
    alone[""] = base_alone(MODEL.value or "")
  first = next(iter((adapters or alone).values()))
  capacity = CAPACITY.value
  if capacity is None:
    capacity = len(adapters) + (MORE if roots else 0)
  bank = AdapterBank(
    adapters or alone,
    capacity=max(capacity, 1),
    resident=RESIDENT.value,
    base=MODEL.value,
    dtype=jnp.dtype(DTYPE.value),
  )
  for name in alone:
    bank.remove(name)
  rows = None
  if first.about.get("kind") == WORDS:
    rows = Rows(
      bank,
      rows=ROWS.value,
      length=LENGTH.value,
      queue=QUEUE.value,
      per_client=PER_CLIENT.value,
    )
    show_stage("compiling")
    rows.warm_up()
  service = Service(
    bank,
    base=NAME.value or public_name(MODEL.value or first.base),
    rows=rows,
    template=TEMPLATE.value,
    token=token,
    limits=Limits(
      body=BODY.value, clients=CLIENTS.value, seconds=TIMEOUT.value
    ),
    folders=roots,
    load=load,
    on_failure=lambda: setattr(server, "should_exit", True),
  )

  class Server(uvicorn.Server):
    """Whose running answers end some time after the signal."""

    def handle_exit(self, sig: int, frame: Any) -> None:
      super().handle_exit(sig, frame)
      service.give_up_after(GRACE.value)

    async def startup(self, sockets: Any = None) -> None:
      await super().startup(sockets)
      host = f"[{HOST.value}]" if ":" in HOST.value else HOST.value
      there = f"http://{host}:{address.getsockname()[1]}"
      Console().print(f"{len(bank)} adapters of {service.base} on {there}")

  server = Server(
    uvicorn.Config(
      service,
      log_config=None,
      access_log=False,
      proxy_headers=False,
      server_header=False,
      # clients keep connections for some seconds, and uvicorn 5: one that is
      # used again as it is closed loses a request
      timeout_keep_alive=75,
      timeout_graceful_shutdown=int(GRACE.value) + 5,
    )
  )
  start_log()
  # uvicorn raises a signal again when all is done, as which it is no failure
  signal.signal(signal.SIGTERM, lambda *_: None)
  server.run([address])
  if service.failed:
    raise UserError("The server ended, for its scheduler failed; see above.")


def read_token() -> str | None:
  """What clients have to bring; None: nothing."""
  token = os.environ.get("VERA_JAX_TOKEN")
  if TOKEN_FILE.value:
    file = local_copy(TOKEN_FILE.value)
    try:
      token = read_bytes(file, inside=None, limit=JSON).decode().strip()
    except UnicodeDecodeError as error:
      raise UserError(f"{file} holds no text.") from error
  if token is not None and not (token.isascii() and token.isprintable()):
    raise UserError("The token has characters that can't be sent.")
  if token == "":
    raise UserError("The token is empty: give one, or none at all.")
  return token


def bound(host: str, port: int) -> socket.socket:
  """The address, taken before seconds are spent on loading."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  address = socket.socket(family)
  address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    address.bind((host, port))
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f"--host={host} --port={port} can't be listened on: {reason}."
    ) from error
  return address


def named_adapters(names: list[str]) -> tuple[dict[str, Any], list[Path]]:
  """Where the adapter of each name is, and the folders that hold several."""
  from vera_jax.adapters.files import HUB_ID

  adapters: list[tuple[str, Any]] = []
  folders = []
  for word in names:
    name, _, place = word.rpartition("=")
    folder = local_copy(place)
    if not folder.is_dir() and HUB_ID.fullmatch(place):
      alone: Any = place
    else:
      alone = adapter_in(folder)
    if alone is not None:
      last = place.partition("@")[0].rstrip("/").rpartition("/")[2]
      adapters.append((name or last, alone))
      continue
    if name or not folder.is_dir():
      raise UserError(
        f"--adapters: {place} is no adapter, nor a folder of any."
      )
    inside = [(x.name, adapter_in(x)) for x in sorted(folder.iterdir())]
    adapters += [(x, adapter) for x, adapter in inside if adapter is not None]
    folders.append(folder)
  if names and not adapters:
    raise UserError(
      f"--adapters: {', '.join(names)} holds no adapter. One is a folder with"
      " adapter.json, or PEFT's adapter_config.json."
    )
  for name, adapter in adapters:
    same = [str(other) for known, other in adapters if known == name]
    if len(same) > 1:
      raise UserError(
        f"--adapters: {' and '.join(same)} have one name, {name}. Give one of"
        f" them another: {name}-2={adapter}"
      )
  return dict(adapters), folders


def adapter_in(folder: Path) -> Path | None:
  """A folder if it is an adapter, or the adapter in it if it is a run's."""
  from vera_jax.adapters.files import ABOUT, adapter_folder, is_pefts

  if not folder.is_dir():
    return None
  adapter = adapter_folder(folder)
  is_adapter = (adapter / ABOUT).is_file() or is_pefts(adapter)
  return adapter if is_adapter else None


def base_alone(base: str) -> "SavedAdapter":
  """An adapter that changes nothing, for a bank that has no other."""
  import jax
  import numpy as np

  from vera_jax.adapters.files import SavedAdapter, tensors
  from vera_jax.adapters.methods import settings_in
  from vera_jax.models.folder import resolve
  from vera_jax.models.hf_weights import fingerprint, read_model
  from vera_jax.models.kinds import KINDS, WORDS
  from vera_jax.pretrained.blueprint import blueprint

  folder = resolve(base)
  config, method = language.get_config(), "lora"
  config.lora.rank = 1
  settings = settings_in(config, method)
  try:
    made = blueprint(
      read_model(folder),
      outputs=1,
      head=KINDS[WORDS].head,
      method=method,
      settings=settings,
    )
  except UserError as error:
    raise UserError(
      f"{base} answers nothing without an adapter: give --adapters. ({error})"
    ) from error
  shapes, _ = made.own_shapes()
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  about: dict[str, Any] = {
    "base": base,
    "base_fingerprint": fingerprint(folder),
    "method": method,
    "settings": settings,
    "labels": [],
    "kind": WORDS,
    "projection_digest": None,
  }
  return SavedAdapter(about, tensors(zeros), folder)


def start_log() -> None:
  """A line for each request, on standard error, unless --quiet."""
  logger = logging.getLogger("vera_jax.serve")
  logger.setLevel(logging.WARNING if Console.hushed else logging.INFO)
  logger.propagate = False
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
  logger.addHandler(handler)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
