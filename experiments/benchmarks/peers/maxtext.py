"""MaxText's sparse layer with its default settings, where its source can be imported.

Sort, three megablox products, sort back (`RoutedMoE.sparse_matmul`), for a mesh of one
chip.  The gate's product is left out, as it is of ours; the selection is not, since
the layer makes it.
"""
# SPDX-License-Identifier: Apache-2.0

import contextlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.benchmarks.shapes import Shape


def present() -> bool:
  """Whether MaxText is installed, or on PYTHONPATH."""
  return importlib.util.find_spec("maxtext") is not None


def layer(
  shape: Shape, device: Any
) -> tuple[Callable[[Any, Array, Array], Array], Any, Callable[[], Any]]:
  """A call `(params, x_TD, logits_TE) -> y_TD`, a sharding, and a context to trace in.

  Args:
    shape: of the layer.
    device: a chip, which need not be here.
  """
  from flax import nnx
  from maxtext.layers import moe  # pyright: ignore[reportMissingImports]
  from maxtext.layers.initializers import (  # pyright: ignore[reportMissingImports]
    nd_dense_init,
  )

  config = _config(shape)
  axes = config.mesh_axes
  mesh = jax.sharding.Mesh(np.array([device]).reshape([1] * len(axes)), axes)

  def made() -> Any:
    return moe.RoutedMoE(
      config=config,
      num_experts=shape.num_experts,
      num_experts_per_tok=shape.k,
      mesh=mesh,
      kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"),
      kernel_axes=("embed", None),
      intermediate_dim=shape.d_ff,
      dtype=jnp.bfloat16,
      weight_dtype=jnp.bfloat16,
      rngs=nnx.Rngs(0),
    )

  @contextlib.contextmanager
  def context() -> Iterator[None]:
    from flax.linen import logical_axis_rules

    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
      yield

  with context():
    graph, state = nnx.split(nnx.eval_shape(made))
  empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)

  def call(params: Any, x_TD: Array, logits_TE: Array) -> Array:
    rows, length = _batch(shape)
    y, _, _ = nnx.merge(graph, empty).sparse_matmul(
      x_TD.reshape(rows, length, -1),
      logits_TE.reshape(rows, length, -1),
      None,
      *(params[name] for name in ("gate_EDF", "up_EDF", "down_EFD")),
      *(None, None, None),
    )
    return y.reshape(x_TD.shape)

  spec = jax.sharding.PartitionSpec()
  return call, jax.sharding.NamedSharding(mesh, spec), context


def _batch(shape: Shape) -> tuple[int, int]:
  """Sequences, and tokens of each."""
  length = min(4096, shape.tokens)
  return shape.tokens // length, length


def _config(shape: Shape) -> Any:
  import maxtext  # pyright: ignore[reportMissingImports]
  from maxtext.configs import pyconfig  # pyright: ignore[reportMissingImports]

  (folder,) = maxtext.__path__
  rows, length = _batch(shape)
  settings = dict(
    run_name="layer",
    enable_checkpointing=False,
    skip_jax_distributed_system=True,
    log_config=False,
    decoder_block="mixtral",
    mlp_activations="['silu','linear']",
    dtype="bfloat16",
    weight_dtype="bfloat16",
    base_emb_dim=shape.d_model,
    base_mlp_dim=shape.d_ff,
    base_moe_mlp_dim=shape.d_ff,
    num_experts=shape.num_experts,
    num_experts_per_tok=shape.k,
    per_device_batch_size=rows,
    max_target_length=length,
  )
  words = [f"{name}={value}" for name, value in settings.items()]
  return pyconfig.initialize(
    ["", str(pathlib.Path(folder) / "configs/base.yml"), *words]
  )
