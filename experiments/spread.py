"""A run over a mesh: its model, state and batches laid out by one table of axes.

Sparse layers run in their own `shard_map` (`jmoe.parallel`), all else is split by XLA
from shardings.  Neither the run's configuration nor its checkpoints know of it: the
same run goes on over another mesh, or without one.
"""
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from experiments import batches, strategies
from experiments.config import Run, sparse_layers
from experiments.planning import sharding as by_name
from experiments.program import Program
from experiments.state import TrainState, path_part
from jmoe import dispatch
from jmoe.config import BlockConfig, ModelConfig, MoEConfig
from jmoe.parallel import EXPERT_TENSOR, Rules, param_specs, rules
from jmoe.use import use

_WHOLE = P()
# What carries rows to experts on other devices, in place of what does not.
_EXCHANGED = {
  dispatch.sort: dispatch.ragged_all_to_all,
  dispatch.buckets: dispatch.all_to_all,
}
# What XLA is told on GPUs, so that what travels does so beside products: by itself it
# starts an exchange where its result is wanted, and then only one at a time.
_BESIDE: dict[str, str | bool] = {
  "xla_gpu_enable_latency_hiding_scheduler": True,
  "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
}
# And of permutations, by which `own_first` goes: copy engines in place of NCCL's
# kernels, with which it is slower than without.  Within one process only, and XLA has
# the word in jax 0.10, not yet in 0.7.
_COPIES: dict[str, str | bool] = {
  "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"
}


@dataclasses.dataclass(frozen=True)
class Spread:
  """A mesh, and the table that says what is split over it.

  Args:
    mesh: of all devices of the job, with Auto axes.
    rules: the table of every sparse layer and of the model.
    strategy: as for `strategies.carrier`, of all sparse layers; None: the exchange that
      fits each, if there is an expert axis.
  """

  mesh: Mesh
  rules: Rules = EXPERT_TENSOR
  strategy: str | None = None

  @property
  def sizes(self) -> Mapping[str, int]:
    return self.mesh.shape

  def __str__(self) -> str:
    return "over " + ",".join(f"{axis}={n}" for axis, n in self.sizes.items())

  def said(self, config: ModelConfig) -> str:
    """The mesh, and how a model's rows travel over it, for people."""
    carriers = [ff.dispatch for ff in sparse_layers(self.model(config))]
    used = set(map(strategies.name_of, carriers))
    return str(self) + (f", dispatch {', '.join(sorted(used))}" if used else "")

  def model(self, config: ModelConfig) -> ModelConfig:
    """The same function of the same parameters, split by the table."""
    segments = tuple(
      (tuple(self._block(block) for block in blocks), repeat)
      for blocks, repeat in config.segments
    )
    return dataclasses.replace(config, segments=segments, sharding=self.rules)

  def _block(self, block: BlockConfig) -> BlockConfig:
    attention, ff = block.attention, block.ff
    if self.rules.axes("sequence", self.sizes) and attention.implementation is None:
      # cuDNN's kernel wants whole sequences.
      attention = dataclasses.replace(attention, implementation="xla")
    if isinstance(ff, MoEConfig):
      carrier = self._carrier(ff)
      ff = dataclasses.replace(ff, sharding=self.rules, dispatch=carrier)
    return dataclasses.replace(block, attention=attention, ff=ff)

  def _carrier(self, ff: MoEConfig) -> Any:
    if self.strategy == strategies.GATHER:
      return ff.dispatch
    own, exchanged = ff.dispatch.function, _EXCHANGED.get(ff.dispatch.function)
    asked = strategies.carrier(self.strategy) if self.strategy else None
    if asked is None and exchanged and self.rules.axes("expert", self.sizes):
      asked = use(exchanged)
    if asked is None:
      return ff.dispatch
    kept = dict(ff.dispatch.kwargs) if asked.function in (own, exchanged) else {}
    if "own_first" in asked.kwargs:  # other ways to send, and to hide it
      kept = {name: kept[name] for name in kept if name not in ("by", "overlap")}
    return use(asked.function, **{**kept, **asked.kwargs})

  def state(self, like: TrainState) -> TrainState:
    """The sharding of every array of a state.

    Moments and float32 copies lie as their parameters; what has another shape, as
    factored moments, is small, and whole on every device.

    Args:
      like: arrays or shapes.
    """
    params = self.params(like.params)

    def one(path: Any, x: Any) -> NamedSharding:
      name = by_name.like(".".join(map(path_part, path)), x.shape, like.params)
      return NamedSharding(self.mesh, _WHOLE if name is None else params[name])

    return jax.tree_util.tree_map_with_path(one, like)

  def params(self, shapes: Mapping[str, Any]) -> dict[str, P]:
    """The spec of each parameter by its dotted name."""
    nested = traverse_util.unflatten_dict(shapes, sep=".")
    specs: Any = param_specs(nested, self.rules, self.sizes)
    flat: Any = traverse_util.flatten_dict(specs, sep=".")
    return dict(flat)

  def shapes(self, like: TrainState) -> TrainState:
    """Shapes of a state with their shardings."""

    def one(x: Any, at: NamedSharding) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    return jax.tree.map(one, like, self.state(like))

  def batch_shapes(self, run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch with their sharding."""
    at = self._rows()
    return {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
      for name, x in batches.shapes(run.data.batch, run.data.seq).items()
    }

  def init(self, made: Program) -> TrainState:
    """The state before the first step, each device's share made where it lies."""
    shardings = self.state(jax.eval_shape(made.init))
    with jax.set_mesh(self.mesh):
      return jax.jit(made.init, out_shardings=shardings)()

  def place(self, state: TrainState) -> TrainState:
    """A state whose arrays are whole on this host, laid out.

    Every process has the same.
    """
    return jax.tree.map(_placed, state, self.state(state))

  def train_step(self, made: Program, rows: "Rows | None" = None) -> "Step":
    """`(state, batch) -> (state, metrics, routing)`; the state is donated.

    Args:
      made: the program of a run over this mesh.
      rows: that this process's batches hold; None: all.
    """
    like = self.state(jax.eval_shape(made.init))
    whole = NamedSharding(self.mesh, _WHOLE)
    step = jax.jit(
      made.train_step,
      donate_argnums=0,
      out_shardings=(like, whole, whole),
      compiler_options=self._options(made.model),
    )
    return Step(self, step, rows)

  def _options(
    self, model: ModelConfig, *, warn: bool = True
  ) -> dict[str, str | bool] | None:
    """Of the compiler, for a step of a model; `warn` where it cannot be as asked."""
    if self.mesh.size == 1 or self.mesh.devices.flat[0].platform != "gpu":
      return None
    if not any(ff.dispatch.kwargs.get("own_first") for ff in sparse_layers(model)):
      return _BESIDE
    if jax.process_count() > 1 or jax.__version_info__ < (0, 10):
      if warn:
        warnings.warn(
          f"own_first with {jax.process_count()} processes and jax {jax.__version__}: "
          "copy engines take one process and jax 0.10; by NCCL's kernels it is slower "
          "than without, so use a --strategy without +own_first.",
          stacklevel=3,
        )
      return _BESIDE
    return _BESIDE | _COPIES

  def eval_step(self, made: Program) -> "Step":
    """`(params, balance, batch) -> sums`, the same on every device."""
    whole = NamedSharding(self.mesh, _WHOLE)
    options = self._options(made.model, warn=False)  # the training step did
    step = jax.jit(made.eval_step, out_shardings=whole, compiler_options=options)
    return Step(self, step, None)

  def put(self, batch: batches.Batch, rows: "Rows | None" = None) -> dict[str, Any]:
    """A batch as global arrays, of which each device has its rows.

    Args:
      batch: i32[b,S] arrays of the rows that this process read.
      rows: which of the whole batch those are; None: all.
    """
    with jax.transfer_guard_host_to_device("allow"):  # the one transfer of a step
      return {name: self._global(x, rows) for name, x in batch.items()}

  def _global(self, x: np.ndarray, rows: "Rows | None") -> jax.Array:
    total = x.shape[0] if rows is None else rows.total

    def part(index: Any) -> np.ndarray:
      first, sequence = index
      if rows is None:
        return x[first, sequence]
      return x[rows.place_B[first]][:, sequence]

    shape = (total, *x.shape[1:])
    return jax.make_array_from_callback(shape, self._rows(), part)

  def rows(self, run: Run) -> "Rows":
    """What this process must read, so that its devices have their rows."""
    total, readers = run.data.batch, run.data.readers or 1
    each = total // readers
    found = self._rows().addressable_devices_indices_map((total, run.data.seq))
    here = {
      row // each
      for index in found.values()
      if index is not None
      for row in range(total)[index[0]]
    }
    place_B = np.full(total, -1)
    for n, reader in enumerate(sorted(here)):
      place_B[reader * each : (reader + 1) * each] = np.arange(n * each, (n + 1) * each)
    return Rows(tuple(sorted(here)), total, place_B)

  def _rows(self) -> NamedSharding:
    return NamedSharding(self.mesh, rules.activation_spec(3, self.rules, self.sizes))


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a batch that a process reads."""

  readers: tuple[int, ...]  # that they come from
  total: int  # rows of the whole batch
  place_B: np.ndarray  # of each row in this process's batch; -1: not here


@dataclasses.dataclass(frozen=True)
class Step:
  """A jitted step that is given the mesh, and batches of NumPy as its last argument."""

  spread: Spread
  jitted: Any
  rows: Rows | None

  def __call__(self, *arguments: Any) -> Any:
    *state, batch = arguments
    batch = self.spread.put(batch, self.rows)
    with jax.set_mesh(self.spread.mesh):
      return self.jitted(*state, batch)

  def lower(self, *shapes: Any) -> Any:
    """The step for shapes with shardings, to be compiled."""
    with jax.set_mesh(self.spread.mesh):
      return self.jitted.lower(*shapes)


def _placed(x: Any, at: NamedSharding) -> jax.Array:
  array = np.asarray(x)
  return jax.make_array_from_callback(array.shape, at, lambda index: array[index])
