"""Depthwise convolution, one small kernel for each channel, as shifted sums.

XLA on a CPU computes it channel by channel, which took 10 to 100 times as long.
Here each of the kernel's taps multiplies the whole image, shifted; XLA joins
the taps to one loop. Padding is TensorFlow's "SAME": what is left over goes
behind.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

Image = Float[Array, "n h w c"]
Filtered = Float[Array, "n oh ow c"]
Kernel = Float[Array, "kh kw 1 c"]


def depthwise(x: Image, kernel: Kernel, *args: Any, **kwargs: Any) -> Filtered:
  """For `nn.Conv(conv_general_dilated=...)`, with its arguments of lax.

  Raises:
    ValueError: the convolution is another than a depthwise one of equal
      strides, not dilated and padded as "SAME".
  """
  strides, padding = args
  plain = all(
    set(kwargs.get(name) or (1,)) == {1}
    for name in ("lhs_dilation", "rhs_dilation")
  )
  channels = {kwargs["feature_group_count"], x.shape[-1], kernel.shape[-1]}
  equal = len(set(strides)) == len(channels) == 1
  if padding != "SAME" or not plain or not equal:
    raise ValueError(
      f"Images {x.shape}, a kernel {kernel.shape}, strides {strides}, padding"
      f" {padding!r} and {kwargs} make no depthwise convolution of equal"
      " strides, undilated and padded as 'SAME'."
    )
  return _depthwise(x, kernel, strides[0])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: Image, kernel: Kernel, stride: int) -> Filtered:
  parts = (
    part * kernel[row, column][None, None]
    for row, column, part in _taps(x, kernel, stride)
  )
  return sum(parts, start=jnp.zeros((), x.dtype))


def _forward(x: Image, kernel: Kernel, stride: int) -> Any:
  return _depthwise(x, kernel, stride), (x, kernel)


def _backward(stride: int, kept: Any, slope: Filtered) -> tuple[Image, Kernel]:
  """The image's gradient is a convolution of `slope`, spread out by the stride,
  with the turned kernel; XLA drops the kernel's where nobody takes it."""
  x, kernel = kept
  spread = [(0, 0, 0)]
  for size, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True):
    before, _ = _padding(size, taps, stride)
    reach = (-(-size // stride) - 1) * stride + 1
    first = taps - 1 - before
    spread.append((first, size + taps - 1 - reach - first, stride - 1))
  wide = lax.pad(slope, jnp.zeros((), slope.dtype), [*spread, (0, 0, 0)])
  rows, columns = kernel.shape[:2]
  parts = (
    wide[:, i : i + x.shape[1], j : j + x.shape[2]]
    * kernel[rows - 1 - i, columns - 1 - j][None, None]
    for i in range(rows)
    for j in range(columns)
  )
  to_kernel = [
    jnp.sum(part * slope, axis=(0, 1, 2))
    for *_, part in _taps(x, kernel, stride)
  ]
  return sum(parts, start=jnp.zeros((), x.dtype)), jnp.stack(to_kernel).reshape(
    kernel.shape
  )


_depthwise.defvjp(_forward, _backward)


def _taps(x: Image, kernel: Kernel, stride: int) -> Any:
  """(row, column, what that tap of the kernel is multiplied with)."""
  sides = list(zip(x.shape[1:3], kernel.shape[:2], strict=True))
  edges = [_padding(size, taps, stride) for size, taps in sides]
  x = jnp.pad(x, ((0, 0), *edges, (0, 0)))
  tall, wide = (1 + (-(-size // stride) - 1) * stride for size, _ in sides)
  for row in range(kernel.shape[0]):
    for column in range(kernel.shape[1]):
      rows = slice(row, row + tall, stride)
      yield row, column, x[:, rows, column : column + wide : stride]


def _padding(size: int, taps: int, stride: int) -> tuple[int, int]:
  """Before and behind."""
  total = max((-(-size // stride) - 1) * stride + taps - size, 0)
  return total // 2, total - total // 2
