"""An adapter's folder to the Hugging Face hub; `load_adapter` takes its id."""

import json
import logging
from pathlib import Path

from vera_jax.adapters.card import CARD, model_card, published
from vera_jax.adapters.files import ABOUT, HUB_ID, TENSORS, load_adapter
from vera_jax.errors import UserError
from vera_jax.files import DATA, read_bytes

log = logging.getLogger(__name__)


def push_adapter(
  folder: str | Path, name: str, *, private: bool = False
) -> str:
  """Upload an adapter's two files and its model card, in one commit.

  The repository is made if there is none. The account is the one of
  `hf auth login`, or of the token in HF_TOKEN. The card is the folder's
  README.md as it is; an older folder without one gets it made. A base that is
  a folder of this machine is named by its last name in all that is uploaded.

  Args:
    folder: the adapter's.
    name: owner/name.
    private: whether a new repository is only for its owner.

  Returns:
    The commit's address.

  Raises:
    UserError: the folder holds no whole adapter, or the hub refuses it.
  """
  match = HUB_ID.fullmatch(name)
  if not match or match["revision"]:
    raise UserError(f"{name!r} is no hub id for an adapter: give owner/name.")
  saved = load_adapter(folder)  # nothing damaged goes out
  from huggingface_hub import CommitOperationAdd, HfApi

  about, base = published(saved.about), saved.about["base"]
  # through the door: a link to a private file would be made public
  card = [CARD] if (saved.folder / CARD).is_file() else []
  content = {CARD: model_card(saved.about).encode()} | {
    name: read_bytes(saved.folder / name, inside=saved.folder, limit=DATA)
    for name in (*card, ABOUT, TENSORS)
  }
  if about != saved.about:
    content[ABOUT] = (json.dumps(about, indent=2) + "\n").encode()
  if about["base"] != base:
    content[CARD] = content[CARD].replace(base.encode(), about["base"].encode())
    log.warning(
      "The base is named %r in what is uploaded, without its folder on this"
      " machine: who loads the adapter says --base=FOLDER. If the base has a"
      ' hub id, write that one as "base" into %s first.',
      *(about["base"], saved.folder / ABOUT),
    )
  files = [CommitOperationAdd(file, data) for file, data in content.items()]
  try:
    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    message = f"Adapter: {saved.about['method']}, {saved.about.get('task')}"
    return api.create_commit(name, files, commit_message=message).commit_url
  except Exception as error:  # of whichever HTTP library the client uses
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(
      f"{name} can't be uploaded: {reason} Log in with `hf auth login`, or set"
      " HF_TOKEN to a token that may write there."
    ) from error
