"""A plan as text."""
# SPDX-License-Identifier: Apache-2.0

from experiments.planning import rates, step, work
from experiments.planning.mesh import Mesh
from experiments.planning.step import Plan, Question
from jmoe.analysis import cost

_GIB = 2**30


def show(question: Question, chosen: Plan, batch: int) -> None:
  """Prints what a step needs by the chosen strategy.

  Args:
    question: what was planned.
    chosen: its plan.
    batch: the largest that fits; 0 for none.
  """
  run, mesh, topology = question.run, question.mesh, question.topology
  counted, chip = cost.parameters(run.model), topology.chip
  tokens = run.data.batch * run.data.seq
  print(
    f"{run.name} on {topology.name}, mesh {mesh}: {mesh.devices} devices of "
    f"{topology.flops / 1e12:,.0f} TFLOP/s and {topology.hbm / _GIB:,.1f} GiB"
  )
  print(
    f"parameters   {_counted(counted.total)}, {_counted(counted.active)} met by a "
    f"token; stored as {run.param_dtype}"
  )
  print(
    f"batch        {run.data.batch:,} rows of {run.data.seq:,} tokens, "
    f"{tokens / mesh.rows / mesh.context:,.0f} tokens a device"
  )
  flops, used = work.of(run), chosen.memory
  print(
    f"FLOPs        {flops.useful:.4g} useful a step, {flops.useful / mesh.devices:.4g} "
    f"a device, {flops.again / mesh.devices:.4g} made again"
  )
  print(f"strategy     {chosen.strategy}{': ' if chosen.note else ''}{chosen.note}")
  print("memory of a device, GiB")
  for name, size in (
    ("parameters", used.parameters),
    ("parameters turned", used.turned),
    ("optimizer", used.optimizer),
    ("batch", used.batch),
    ("gradients", used.gradients),
    ("kept by blocks", used.kept),
    ("a block at work", used.block),
    ("the loss at work", used.loss),
    ("exchange buffers", used.exchange),
  ):
    print(f"  {name:<18}{size / _GIB:9.3f}")
  share = used.peak / topology.hbm
  print(f"  {'peak':<18}{used.peak / _GIB:9.3f}, {share:.0%} of what there is")
  _show_exchanges(question, chosen)
  _show_drops(question)
  times = chosen.times
  print("seconds of a step, predicted")
  for name, value in times._asdict().items():
    print(f"  {name:<18}{value:9.4f}")
  print(
    f"  {'step':<18}{times.step:9.4f}, {tokens / times.step:,.0f} tokens/s, "
    f"{flops.useful / mesh.devices / times.step / topology.flops:.2f} of the peak"
  )
  print(f"  rates measured {rates.rates(chip).measured}; chip: {chip.source}")
  if batch:
    print(f"largest batch that fits: {batch:,} rows, {batch // mesh.rows} a device")
  else:
    print("largest batch that fits: none; use more devices, or a larger fsdp axis")


def _counted(number: float) -> str:
  big = number >= 1e8
  return f"{number / (1e9 if big else 1e6):,.2f} {'billion' if big else 'million'}"


def _show_exchanges(question: Question, chosen: Plan) -> None:
  print("collectives of a step, a device")
  if not chosen.exchanges:
    print("  none")
  for e in chosen.exchanges:
    size = f"{e.size / 1e6:,.1f}"
    print(
      f"  {e.what:<26}{e.collective:<18}{e.axis:<17}{e.count:6} calls{size:>12} MB "
      f"{step.seconds(question, e) * 1e3:9.2f} ms"
    )


def _show_drops(question: Question) -> None:
  found = step.drop_probability(question)
  if found is None:
    return
  fraction, slots, tokens = found
  ff = work.one_sparse(question.run.model)
  assert ff is not None
  where = "the model's capacity" if ff.capacity else f"factor {question.factor:g}"
  also = "" if ff.capacity else "; the model itself is dropless"
  print(
    f"drops        {fraction:.2%} of assignments at {where} ({slots:,} slots of "
    f"{tokens:,} tokens), skew {question.skew:g}{also}"
  )


def show_ranking(question: Question, ranked: list[Plan], most: int = 8) -> None:
  """Prints the strategies of this mesh, and the fastest of each other mesh.

  Args:
    question: whose mesh is this one.
    ranked: of `step.ranked`.
    most: other meshes.
  """
  here = [p for p in ranked if p.question.mesh == question.mesh]
  print(f"strategies on {question.mesh}, the fastest that fits first")
  _show_plans(here)
  for name, why in step.refusals(question).items():
    print(f"  {name:<21}none: {why}")
  best: dict[Mesh, Plan] = {}
  for plan in ranked:
    if plan.question.mesh != question.mesh:
      best.setdefault(plan.question.mesh, plan)
  if best:
    print("the fastest with other expert axes")
    _show_plans(list(best.values())[:most])


def _show_plans(plans: list[Plan]) -> None:
  print(f"  {'':<21}{'step s':>9}{'rows s':>9}{'GiB':>8}")
  for plan in plans:
    print(
      f"  {plan.strategy:<21}{plan.times.step:9.4f}{plan.times.rows:9.4f}"
      f"{plan.memory.peak / _GIB:8.2f}  {plan.question.mesh}"
      f"{'' if plan.fits else ', does not fit'}"
    )
