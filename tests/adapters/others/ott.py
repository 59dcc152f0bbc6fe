"""ott's input convex network: kernels that are rectified before they are
multiplied with, and quadratic forms."""

import flax.linen as nn
import jax.numpy as jnp

from tests.adapters.others.other import Other, normal


class PositiveDense(nn.Module):
  """x times a kernel without its negative entries."""

  features: int

  @nn.compact
  def __call__(self, x):
    first = nn.initializers.lecun_normal()
    kernel = self.param("kernel", first, (x.shape[-1], self.features))
    return x @ nn.relu(kernel)


class PosDefPotentials(nn.Module):
  """x (A A + diag(d)) x / 2 + b x + c, by three parameters of its own."""

  potentials: int

  @nn.compact
  def __call__(self, x):
    width, first = x.shape[-1], nn.initializers.normal(0.5)
    diagonal = self.param("diag_kernel", first, (width, self.potentials))
    quad = self.param("quad_kernel", first, (self.potentials, width, 2))
    linear = self.param("lin_kernel", first, (width, self.potentials))
    bias = self.param("bias", first, (self.potentials,))
    y = 0.5 * x**2 @ nn.softplus(diagonal)
    y = y + 0.5 * jnp.square(jnp.einsum("bi,pir->bpr", x, quad)).sum(-1)
    return y + x @ linear + bias[None]


class ICNN(nn.Module):
  """With a projection onto positive weights, or with layers of flax's whose
  weights the loss keeps positive."""

  positive: bool

  def setup(self):
    self.w_zs = [
      PositiveDense(size) if self.positive else nn.Dense(size, use_bias=False)
      for size in (5, 1)
    ]
    self.w_xs = [PosDefPotentials(size) for size in (4, 5, 1)]
    self.potentials = PosDefPotentials(1)

  def __call__(self, x):
    z = nn.relu(self.w_xs[0](x))
    for w_z, w_x in zip(self.w_zs, self.w_xs[1:], strict=True):
      z = nn.relu(w_z(z) + w_x(x))
    return (z + self.potentials(x))[:, 0]


class Mapped(nn.Module):
  """The potential, and a network beside it that says where it starts."""

  positive: bool

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(3, name="first")(x)
    return ICNN(self.positive, name="icnn")(nn.tanh(y))


ORIGIN = "ott-jax/ott: ICNN, PositiveDense, PosDefPotentials"
MODELS = {
  "ott's ICNN, rectified": Other(ORIGIN, Mapped(True), (normal(4, 3),)),
  "ott's ICNN, unconstrained": Other(ORIGIN, Mapped(False), (normal(4, 3),)),
}
