"""A rollout engine for tunix's reinforcement learning, which samples quickly.

An adapted layer costs some work at each token that is drawn. `MergedRollout`
multiplies the adapter into the weights once after each update, and samples from
these:

  ClusterConfig(rollout_engine=vera_jax.nnx.tunix.MergedRollout, ...)
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vera_jax.errors import UserError
from vera_jax.nnx.adapt import merge, reference

try:
  from tunix.rl import utils
  from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
  from tunix.rl.rollout.vanilla_rollout import VanillaRollout
except ImportError as error:
  raise UserError(
    f"tunix can't be imported ({error}); requirements-tunix.txt installs it."
  ) from error


class MergedRollout(VanillaRollout):
  """tunix's own rollout, on weights into which the adapter is merged.

  `model()` is an adapted copy that shares all arrays with the trained model but
  the trained ones. So tunix sees that these have to be sent, and sends them
  alone.
  """

  def __init__(
    self,
    rollout_actor: nnx.Module,
    tokenizer: Any,
    mesh: Mesh | None,
    rollout_config: RolloutConfig,
  ):
    """tunix's cluster calls this.

    Raises:
      UserError: the actor has no adapter, or the rollout is to have another
        mesh or data type than the actor.
    """
    self._adapted = reference(rollout_actor)
    graph, state = nnx.split(self._adapted)
    actor_mesh = utils.get_pytree_mesh_info(state)
    if mesh is not None and not mesh.empty and mesh != actor_mesh:
      raise UserError(
        "MergedRollout samples where the actor is trained: give the roles ACTOR"
        " and ROLLOUT the same mesh."
      )
    if rollout_config.data_type is not None:
      raise UserError(
        "MergedRollout samples in the actor's data type: leave data_type out of"
        " the RolloutConfig."
      )
    self._merge = jax.jit(
      lambda state: nnx.state(merge(nnx.merge(graph, state)))
    )
    config: Any = vars(rollout_actor)["config"]
    super().__init__(
      merge(self._adapted),
      tokenizer,
      CacheConfig(
        cache_size=rollout_config.kv_cache_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
      ),
    )
    self._sampler.transformer_state = self._merge(state)

  def model(self) -> nnx.Module:
    """The adapted copy, whose leaves tunix compares with the trained ones."""
    return self._adapted

  def update_params(
    self, params: Any, filter_types: tuple[Any, ...] | None = None
  ) -> None:
    """Take the trained leaves, and merge.

    Raises:
      UserError: leaves of the adapter are not among what was sent, or the
        weights stay as they were although the leaves moved.
    """
    del filter_types  # what was sent says by itself what it is
    before = nnx.state(self._adapted, nnx.LoRAParam)
    sent = nnx.to_pure_dict(nnx.filter_state(params, nnx.LoRAParam))
    if jax.tree.structure(sent) != jax.tree.structure(nnx.to_pure_dict(before)):
      raise UserError(
        "What the trainer sent to the rollout are not the adapter's leaves, so"
        " that the rollout would not answer as the trained model."
      )
    nnx.update(self._adapted, params)
    merged = self._merge(nnx.state(self._adapted))
    moved = nnx.state(self._adapted, nnx.LoRAParam)
    old = self._sampler.transformer_state
    if _differ(before, moved) and not _differ(old, merged):
      raise UserError(
        "The adapter was trained, but the merged weights are those before it:"
        " the rollout would not answer as the trained model. In bfloat16 a"
        " step may be too small for the weights; hold them in float32."
      )
    self._sampler.transformer_state = merged


def _differ(before: Any, after: Any) -> bool:
  """Whether a value of one state is another one in the other."""
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  return any(a is not b and not bool(jnp.array_equal(a, b)) for a, b in pairs)
