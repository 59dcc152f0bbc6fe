"""A rollout engine for tunix's reinforcement learning: sampling merged weights.

  ClusterConfig(rollout_engine=vera_jax.nnx.tunix.MergedRollout, ...)

An adapted layer makes its product anew for each token that is drawn; here the
adapter is multiplied into the weights once after each update.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vera_jax.errors import UserError, install
from vera_jax.nnx.adapt import merge, reference, remove

try:
  from tunix.rl import utils
  from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
  from tunix.rl.rollout.vanilla_rollout import VanillaRollout
except ImportError as error:
  raise UserError(
    f"tunix can't be imported ({error}): {install('tunix')}"
  ) from error


class MergedRollout(VanillaRollout):
  """tunix's own rollout on merged weights.

  `model()` is an adapted copy that shares all arrays with the actor but the
  trained ones: by these tunix sees that the two differ, and sends them.
  """

  def __init__(
    self,
    rollout_actor: nnx.Module,
    tokenizer: Any,
    mesh: Mesh | None,
    rollout_config: RolloutConfig,
  ):
    """The cluster calls this.

    Raises:
      UserError: the actor has no adapter, or the rollout asks for another mesh
        or data type.
    """
    self._adapted = reference(rollout_actor)
    plain = remove(nnx.clone(self._adapted))
    graph, state = nnx.split(self._adapted)
    weights = nnx.state(plain)

    @jax.jit
    def changed(state: Any) -> Any:
      """The adapted weights alone: others would be copied."""
      kept = {id(leaf) for leaf in jax.tree.leaves(state)}
      merged = nnx.state(merge(nnx.merge(graph, state)))
      return nnx.filter_state(
        merged, lambda _, variable: id(variable.get_value()) not in kept
      )

    self._merge = lambda: nnx.merge_state(
      weights, changed(nnx.state(self._adapted))
    )
    of_actor = utils.get_pytree_mesh_info(state)
    elsewhere = mesh is not None and not mesh.empty and mesh != of_actor
    if elsewhere or rollout_config.data_type is not None:
      raise UserError(
        "MergedRollout samples where the actor is, in its data type: give both"
        " roles the same mesh, and leave data_type out of the RolloutConfig."
      )
    config: Any = vars(rollout_actor)["config"]
    cache = CacheConfig(
      cache_size=rollout_config.kv_cache_size,
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    )
    super().__init__(plain, tokenizer, cache)
    self._sampler.transformer_state = self._merge()

  def model(self) -> nnx.Module:
    """The adapted copy, which tunix compares with the actor."""
    return self._adapted

  def update_params(
    self, params: Any, filter_types: tuple[Any, ...] | None = None
  ) -> None:
    """Take the actor's trained leaves, and merge.

    Raises:
      UserError: what was sent are not the adapter's leaves, or the weights are
        the same although the leaves moved.
    """
    mine = nnx.state(self._adapted, nnx.LoRAParam)
    sent, before = (
      nnx.filter_state(params, nnx.LoRAParam),
      jax.tree.leaves(mine),
    )
    if {*nnx.to_flat_state(sent).paths} != {*nnx.to_flat_state(mine).paths}:
      raise UserError(
        "The adapter's leaves are not what the trainer sent to the rollout,"
        " which would answer as another model than the trained one."
      )
    # Copies: tunix stops sending to a model that has the actor's own arrays.
    nnx.update(self._adapted, jax.tree.map(jnp.copy, sent))
    merged = self._merge()
    moved = _differ(before, nnx.state(self._adapted, nnx.LoRAParam))
    if moved and not _differ(self._sampler.transformer_state, merged):
      raise UserError(
        "The adapter moved, but the merged weights are the same: the rollout"
        " would answer as another model than the trained one. bfloat16 may be"
        " too coarse for so small a step; hold the weights in float32."
      )
    self._sampler.transformer_state = merged


def _differ(before: Any, after: Any) -> bool:
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  return any(not bool(jnp.array_equal(*pair)) for pair in pairs)
