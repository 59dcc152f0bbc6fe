"""The run-time check of annotations that tests switch on."""

from beartype import BeartypeConf, beartype

# An int serves where a float is asked for, as type checkers have it (PEP 484).
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
