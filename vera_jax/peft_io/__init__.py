"""PEFT's adapter folders, read and written without torch.

`import_adapter` makes our folder of PEFT's, `export_adapter` PEFT's of ours.
"""

from vera_jax.peft_io.reading import import_adapter
from vera_jax.peft_io.writing import export_adapter

__all__ = ["export_adapter", "import_adapter"]
