"""The forms in which PEFT holds methods: a file per method, a line each here.

A new one is a file with a `Form`, a line in `FORMS`, and the lines in `HELD_BY`
of our methods that it can hold.
"""

from vera_jax.peft_io.forms.form import Exported, Form, Ours
from vera_jax.peft_io.forms.ia3 import IA3
from vera_jax.peft_io.forms.lora import LORA
from vera_jax.peft_io.forms.randlora import RANDLORA
from vera_jax.peft_io.forms.unilora import UNILORA
from vera_jax.peft_io.forms.vera import PVERA, VERA

# By PEFT's name of the method, which is its peft_type in lower case.
FORMS: dict[str, Form] = {
  "vera": VERA,
  "pvera": PVERA,
  "lora": LORA,
  "ia3": IA3,
  "randlora": RANDLORA,
  "unilora": UNILORA,
}
# PEFT's methods that can hold ours; the first one is taken if none is named.
HELD_BY = {
  "vera": ("vera", "lora"),
  "lora": ("lora",),
  "dora": ("lora",),
  "dvora": ("lora",),
  "lora_fa": ("lora",),
  "onelora": ("vera", "lora"),
  "pvera": ("pvera", "lora"),
  "randlora": ("randlora",),
  "unilora": ("unilora", "lora"),
  "tied_lora": ("lora",),
  "ia3": ("ia3",),
}

__all__ = ["FORMS", "HELD_BY", "Exported", "Form", "Ours"]
