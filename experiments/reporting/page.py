"""The page of `experiments.report`: sections as data, filled into a template."""
# SPDX-License-Identifier: Apache-2.0

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jinja2
import numpy as np
from markupsafe import Markup

from experiments.reporting import charts, grouping, maps, routes, tables
from experiments.reporting.read import Recorded, Routing
from experiments.workdir import listed
from jmoe.analysis import specialisation

_LAST = 10  # watched steps that count as the end of training

_CELLS = 1_000_000  # of all maps over training together: the page stays under 3 MB
_STEPS = (24, 120)  # least and most columns of such a map

_T = TypeVar("_T")
Panels = list[tuple[str, list[Markup]]]  # label of a run, and its pictures


def page(runs: Sequence[Recorded]) -> str:
  """HTML that needs nothing but itself."""
  labels = grouping.labels(runs)
  named = list(zip(labels, runs, strict=True))
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  sparse = [(label, run.routing) for label, run in named if run.routing is not None]
  return environment.get_template("page.html.jinja").render(
    title=", ".join(dict.fromkeys(run.name for run in runs)),
    legend=[
      (label, colour, dash != "-", tables.progress(run))
      for (label, run), (colour, dash) in zip(named, charts.colours(runs), strict=True)
    ],
    labels=labels,
    scale=maps.scale(),
    summary=tables.summary(runs),
    bits=tables.bits(named),
    alarms=tables.alarms(runs),
    differences=[
      (label, listed(found))
      for label, run in named[1:]
      if (found := grouping.config_differences(runs[0], run))
    ],
    curves=Markup(charts.curves(runs)) if _any_metrics(runs) else None,
    has_dense=any(run.routing is None and run.metrics for run in runs),
    final=[(label, [_final_load(routing)]) for label, routing in sparse],
    training=_load_over_training(sparse),
    drops=_drops(sparse),
    entropy=_entropy(sparse),
    dead=_dead(sparse),
    dead_table=_by_layer(sparse, _dead_at_the_end),
    domains=_domain_maps(named),
    information=_information(named),
    routes=routes.sections(named),
    extraction=routes.curves(named),
  )


def _top(arrays: Iterable[np.ndarray]) -> float:
  """The largest finite number."""
  return max((float(x[np.isfinite(x)].max(initial=0)) for x in arrays), default=0.0)


def _until(sparse: Sequence[tuple[str, Routing]]) -> int:
  return max((int(routing.step[-1]) for _, routing in sparse), default=1)


def _any_metrics(runs: Sequence[Recorded]) -> bool:
  return any("bits_per_byte" in run.metrics for run in runs)


def _panels(
  sparse: Sequence[tuple[str, Routing]], draw: Callable[[Routing], str]
) -> Panels:
  return [(label, [Markup(draw(routing))]) for label, routing in sparse]


def _final_load(routing: Routing) -> Markup:
  most = max(layer.load.shape[1] for layer in routing.layers)
  load = np.full((len(routing.layers), most), np.nan)
  for n, layer in enumerate(routing.layers):
    load[n, : layer.load.shape[1]] = layer.load[-_LAST:].mean(0)
  names = [layer.name for layer in routing.layers]
  return maps.load_map(
    load, title="", x="expert", rows=names, numbers=most <= 16, width=432
  )


def _load_over_training(sparse: Sequence[tuple[str, Routing]]) -> Panels:
  experts = sum(layer.load.shape[1] for _, r in sparse for layer in r.layers)
  most = min(max(_CELLS // max(experts, 1), _STEPS[0]), _STEPS[1])
  return [
    (
      label,
      [
        maps.load_map(
          charts.binned(layer.load.astype(np.float64), most).T,
          title=layer.name,
          x="step",
          y="expert",
          columns=(int(routing.step[0]), int(routing.step[-1])),
          even=charts.binned(layer.load.mean(1, keepdims=True), most).T,
        )
        for layer in routing.layers
      ],
    )
    for label, routing in sparse
  ]


def _drops(sparse: Sequence[tuple[str, Routing]]) -> Panels:
  until = _until(sparse)
  top = _top(s for _, r in sparse for x in r.layers for s in x.dropped.values())
  return _panels(sparse, lambda routing: charts.drops(routing, top=top, until=until))


def _entropy(sparse: Sequence[tuple[str, Routing]]) -> Panels:
  until = _until(sparse)
  top = _top(x.entropy for _, r in sparse for x in r.layers)
  return _panels(
    sparse,
    lambda routing: charts.by_layer(
      routing,
      lambda n: routing.layers[n].entropy,
      title="entropy of a token's scores, nats",
      top=top,
      until=until,
    ),
  )


def _dead(sparse: Sequence[tuple[str, Routing]]) -> Panels:
  counts = {
    label: [specialisation.dead_experts(x.load).sum(-1) for x in routing.layers]
    for label, routing in sparse
  }
  until = _until(sparse)
  top = _top(count for found in counts.values() for count in found)
  return [
    (
      label,
      [
        Markup(
          charts.by_layer(
            routing,
            lambda n, found=counts[label]: found[n],
            title="experts under 1 % of an even share in a watched step",
            top=max(top, 1),
            until=until,
            whole=True,
          )
        )
      ],
    )
    for label, routing in sparse
  ]


def _dead_at_the_end(routing: Routing) -> list[tuple[str, str]]:
  found = []
  for layer in routing.layers:
    (dead,) = np.nonzero(specialisation.dead_experts(layer.load[-_LAST:].sum(0)))
    which = f" ({', '.join(map(str, dead[:8]))}{', …' if len(dead) > 8 else ''})"
    found.append((layer.name, f"{len(dead)}{which if len(dead) else ''}"))
  return found


def _by_layer(
  found: Sequence[tuple[str, _T]], values: Callable[[_T], list[tuple[str, str]]]
) -> dict[str, Any] | None:
  """A table, layers by runs; layers of different runs meet by their place."""
  if not found:
    return None
  columns = [values(value) for _, value in found]
  rows = []
  for n in range(max(map(len, columns))):
    names = dict.fromkeys(column[n][0] for column in columns if n < len(column))
    cells = [column[n][1] if n < len(column) else tables.NONE for column in columns]
    rows.append((" / ".join(names), cells))
  return {"head": [label for label, _ in found], "rows": rows}


def _domain_maps(named: Sequence[tuple[str, Recorded]]) -> Panels:
  return [
    (
      label,
      [
        maps.load_map(
          load.astype(np.float64),
          title=f"{name}: {_bits(specialisation.mutual_information(load)):.3f} bits",
          x="expert",
          rows=run.evaluation.domains,
        )
        for name, load in run.evaluation.layers
      ],
    )
    for label, run in named
    if run.evaluation is not None and run.evaluation.layers
  ]


def _information(named: Sequence[tuple[str, Recorded]]) -> dict[str, Any] | None:
  """Mutual information by layer; of at most the entropy of the domains themselves."""
  known = [
    (label, run.evaluation.layers)
    for label, run in named
    if run.evaluation is not None and run.evaluation.layers
  ]

  def cells(layers: Any) -> list[tuple[str, str]]:
    found = []
    for name, load in layers:
      nats = specialisation.mutual_information(load)
      most = min(specialisation.load_entropy(load.sum(1)), math.log(load.shape[1]))
      share = f"{100 * nats / most:.0f} %; " if most > 0 else ""
      chance = _bits(specialisation.miller_madow(load))
      found.append((name, f"{_bits(nats):.3f} ({share}by chance {chance:.1g})"))
    return found

  return _by_layer(known, cells)


def _bits(nats: Any) -> float:
  return float(nats) / math.log(2)
