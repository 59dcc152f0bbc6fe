"""An adapter's folder to the Hugging Face hub; `load_adapter` takes its id."""

from pathlib import Path

from vera_jax.adapters.card import CARD, model_card
from vera_jax.adapters.files import ABOUT, HUB_ID, TENSORS, load_adapter
from vera_jax.errors import UserError


def push_adapter(
  folder: str | Path, name: str, *, private: bool = False
) -> str:
  """Upload an adapter's two files and its model card, in one commit.

  The repository is made if there is none. The account is the one of
  `hf auth login`, or of the token in HF_TOKEN. The card is the folder's
  README.md as it is; an older folder without one gets it made.

  Args:
    folder: the adapter's.
    name: owner/name.
    private: whether a new repository is only for its owner.

  Returns:
    The commit's address.

  Raises:
    UserError: the folder holds no whole adapter, or the hub refuses it.
  """
  found = HUB_ID.fullmatch(name)
  if not found or found["revision"]:
    raise UserError(f"{name!r} is no hub id for an adapter: give owner/name.")
  saved = load_adapter(folder)  # nothing damaged goes out
  from huggingface_hub import CommitOperationAdd, HfApi

  card: str | bytes = model_card(saved.about)
  if (saved.folder / CARD).is_file():
    card = (saved.folder / CARD).read_bytes()
  content = {CARD: card.encode() if isinstance(card, str) else card}
  content |= {f: (saved.folder / f).read_bytes() for f in (ABOUT, TENSORS)}
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
