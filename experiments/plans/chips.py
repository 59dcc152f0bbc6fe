"""The chips that a plan can be made for, and what to say without libtpu."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from vera_jax.errors import UserError

GIB = 2**30
# Bytes of HBM per chip, by the kind that JAX calls it: Google's figures.
MEMORY = {
  "TPU v4": 32 * GIB,
  "TPU v5 lite": 16 * GIB,
  "TPU v5": 95 * GIB,
  "TPU v6 lite": 32 * GIB,
}
INSTALL = "pip install libtpu"


class Pod(NamedTuple):
  """A described topology.

  Attributes:
    memory: bytes of HBM for each of `devices`; where a chip is two devices,
      half of the chip's.
  """

  name: str
  devices: Sequence[Any]
  kind: str
  memory: int


def use_no_accelerator() -> None:
  """Compile on the CPU, for whatever chips; call it before JAX is used."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no cloud for a TPU
  if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")


def device_named(name: str) -> Any:
  """This machine's CPU for "cpu", else the first chip of a topology.

  Raises:
    UserError: as `describe_pod`.
  """
  if name == "cpu":
    return jax.devices("cpu")[0]
  return describe_pod(name).devices[0]


def describe_pod(name: str) -> Pod:
  """A topology by its name, such as v5e:16x16.

  Raises:
    UserError: libtpu is missing or locked, or knows no such topology.
  """
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"Compiling for {name} needs libtpu, the TPU compiler, which needs no"
      f" TPU: {INSTALL}"
    ) from error
  devices: Any
  try:
    devices = topologies.get_topology_desc(name, "tpu").devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    first_line = str(error).strip().partition("\n")[0]
    raise UserError(
      f"XLA can't describe {name!r} ({first_line}). A topology reads"
      " KIND:XxY, such as v5e:2x2, v5e:16x16, v6e:2x4; libtpu serves one"
      " process at a time."
    ) from error
  kind = devices[0].device_kind
  if kind not in MEMORY:
    raise UserError(
      f"{name} has chips of kind {kind}; known are {', '.join(MEMORY)}."
    )
  chips = {tuple(device.coords) for device in devices}
  return Pod(name, devices, kind, MEMORY[kind] * len(chips) // len(devices))
