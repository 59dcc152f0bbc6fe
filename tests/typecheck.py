"""The run-time check of annotations that tests switch on."""

from pathlib import Path, PurePosixPath

from beartype import BeartypeConf, FrozenDict, beartype

checked = beartype(
  conf=BeartypeConf(
    # An int serves where a float is asked for, as type checkers have it (PEP
    # 484).
    is_pep484_tower=True,
    # What `places.place` returns is annotated as Path; a store's is only used
    # as one.
    hint_overrides=FrozenDict({Path: Path | PurePosixPath}),
  )
)
