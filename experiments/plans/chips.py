"""The chips that a plan can be made for, and what to say without libtpu."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from vera_jax.errors import UserError
from vera_jax.train.flops import PEAK

GIB = 2**30


class Chip(NamedTuple):
  """Google's figures of a kind of chip.

  Attributes:
    memory: bytes of HBM.
    bandwidth: bytes per second that HBM reads or writes.
    links: bytes per second that it receives from other chips of its slice, by
      all its links together (ICI).
  """

  memory: int
  bandwidth: float
  links: float


# By the name that JAX has for the kind.
CHIPS = {
  "TPU v4": Chip(32 * GIB, 1228e9, 300e9),
  "TPU v5 lite": Chip(16 * GIB, 819e9, 200e9),
  "TPU v5": Chip(95 * GIB, 2765e9, 600e9),
  "TPU v6 lite": Chip(32 * GIB, 1640e9, 448e9),
}
INSTALL = "pip install libtpu"


class Pod(NamedTuple):
  """A described topology.

  Attributes:
    memory: bytes of HBM for each of `devices`; where a chip is two devices,
      half of the chip's.
    flops: FLOP/s of each at most, in bfloat16.
    bandwidth, links: bytes per second of each at most, as `Chip` has them.
  """

  name: str
  devices: Sequence[Any]
  kind: str
  memory: int
  flops: float
  bandwidth: float
  links: float


def use_no_accelerator() -> None:
  """Compile on the CPU, for whatever chips; call it before JAX is used."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no cloud for a TPU
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU
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
  if kind not in CHIPS:
    raise UserError(
      f"{name} has chips of kind {kind}; known are {', '.join(CHIPS)}."
    )
  chip, chips = CHIPS[kind], {tuple(device.coords) for device in devices}
  share = len(chips) / len(devices)
  return Pod(
    name,
    devices,
    kind,
    int(share * chip.memory),
    PEAK[kind],
    share * chip.bandwidth,
    share * chip.links,
  )
