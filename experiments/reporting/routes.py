"""Whom tokens ask, on the page: what `experiments.routes` and `emo` left behind."""
# SPDX-License-Identifier: Apache-2.0

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.errors import BadData
from experiments.reporting import charts, extraction, maps
from experiments.reporting.read import Recorded
from jmoe.analysis import routes, specialisation

_DRAWN = 96  # documents of a map at most

Found = Mapping[str, Any]
Panels = list[tuple[str, list[Markup]]]
# Names of rows and of columns, and the cells of a run's layers.
Table = dict[str, Any]


def sections(named: Sequence[tuple[str, Recorded]]) -> dict[str, Any] | None:
  """What the template asks for; None if no run was looked at."""
  known = [
    (label, found)
    for label, run in named
    if (found := _read(run, "routes.json")) is not None
  ]
  if not known:
    return None
  try:
    return {
      "scale": maps.alike_scale(),
      "told": [(label, [Markup(_curves(found))]) for label, found in known],
      "told_tables": [(label, _told(found)) for label, found in known],
      "classes": _each(known, _class_map, "classes"),
      "alike_table": [(label, _alike(found)) for label, found in known],
      "domains": _each(known, _domain_map),
      "documents": _each(known, _document_map),
      "lift": _each(known, _lift_map),
      "kept": [(label, _kept(found)) for label, found in known if found["stability"]],
    }
  except (KeyError, TypeError, ValueError, IndexError) as error:
    raise BadData(
      f"routes.json of {', '.join(label for label, _ in known)} is none that "
      f"experiments.routes writes ({error!r}); delete it and run that again."
    ) from None


def curves(named: Sequence[tuple[str, Recorded]]) -> Markup | None:
  """Bits per byte against experts kept, of runs with an extraction.jsonl."""
  records = []
  for label, run in named:
    cases = _cases(run)
    if cases:
      records.append({"arm": label, "cases": cases})
  if not records:
    return None
  with matplotlib.rc_context(charts.STYLE):
    figure = extraction.figure(records)
    return Markup(charts.svg(figure, "Bits per byte against experts kept"))


def _read(run: Recorded, name: str) -> Found | None:
  path = run.path / name
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_bytes())
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise BadData(f"{path} is not a JSON object; delete it and measure again.")
  return found


def _cases(run: Recorded) -> list[dict[str, Any]]:
  """Those of the newest checkpoint that was cut; a last line may be half written."""
  path = run.path / "extraction.jsonl"
  if not path.exists():
    return []
  names = ("domain", "share", "documents", "bits")
  try:
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    cases = [{name: line[name] for name in (*names, "step")} for line in lines]
    last = max((case["step"] for case in cases), default=0)
  except (ValueError, KeyError, TypeError):
    raise BadData(
      f"{path} is none that experiments.emo writes; delete it and run that again."
    ) from None
  return [case for case in cases if case["step"] == last and case["bits"] is not None]


def _each(
  known: Sequence[tuple[str, Found]],
  draw: Callable[[Found, Mapping[str, Any]], Markup],
  needs: str = "name",
) -> Panels:
  """A picture of each layer that has what it takes."""
  found = [
    (label, [draw(each, x) for x in each["layers"] if x[needs] is not None])
    for label, each in known
  ]
  return [(label, pictures) for label, pictures in found if pictures]


def _titles(found: Found) -> list[str]:
  """'domain, all text' and so on: what experts are asked about."""
  rows = found["layers"][0]["information"]
  return [f"{row['labels']}, {row['text']} text" for row in rows]


def _curves(found: Found) -> str:
  """Bits that a choice tells of each kind of label, over chance, layer by layer."""
  layers = found["layers"]
  with matplotlib.rc_context(charts.STYLE):
    figure = Figure(figsize=(5.4, 2.6), layout="constrained")
    axes = figure.subplots()
    for n, title in enumerate(_titles(found)):
      rows = [layer["information"][n] for layer in layers]
      over = [row["bits"] - row["by_chance"] for row in rows]
      dash = "-" if rows[0]["text"] == "all" else (0, (5, 1.5))
      colour = charts.PALETTE[n % len(charts.PALETTE)]
      axes.plot(over, linestyle=dash, color=colour, marker=".", label=title)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("sparse layer")
    axes.set_title("bits that a choice of an expert tells, over chance")
    axes.legend(frameon=False, fontsize=8)
    return charts.svg(figure, "What experts tell, by layer")


def _told(found: Found) -> Table:
  """Layers by labels: bits over chance, and of how many."""
  rows = []
  for layer in found["layers"]:
    cells = []
    for row in layer["information"]:
      over, most = row["bits"] - row["by_chance"], row["at_most"]
      share = f", {100 * over / most:.0f} %" if most > 0 else ""
      cells.append(f"{over:.3f} ({row['bits']:.3f} − {row['by_chance']:.3f}{share})")
    rows.append((layer["name"], cells))
  return {"head": _titles(found), "rows": rows}


def _class_map(found: Found, layer: Mapping[str, Any]) -> Markup:
  load_CE = np.asarray(layer["classes"], np.float64)
  return maps.load_map(load_CE, title=layer["name"], x="expert", rows=found["classes"])


def _by_domain(found: Found, layer: Mapping[str, Any]) -> np.ndarray:
  """f64[domains,E] of the documents of each."""
  load = np.asarray(layer["load"], np.float64)
  domain = np.asarray(found["document_domain"])
  return np.stack([load[domain == d].sum(0) for d in range(len(found["domains"]))])


def _domain_map(found: Found, layer: Mapping[str, Any]) -> Markup:
  cosine = specialisation.cosine(_by_domain(found, layer))
  return maps.alike_map(cosine, title=layer["name"], x="domain", rows=found["domains"])


def _document_map(found: Found, layer: Mapping[str, Any]) -> Markup:
  """Documents in the order of domains, of which as many are drawn of each."""
  domain = np.asarray(found["document_domain"])
  each = max(_DRAWN // len(found["domains"]), 1)
  shown = [np.flatnonzero(domain == d)[:each] for d in range(len(found["domains"]))]
  load = np.asarray(layer["load"], np.float64)[np.concatenate(shown)]
  return maps.alike_map(
    specialisation.cosine(load), title=layer["name"], x="document", y="document"
  )


def _alike(found: Found) -> Table:
  """Mean cosines of layers: between domains, of documents within and between them."""
  domain = np.asarray(found["document_domain"])
  same = domain[:, None] == domain[None, :]
  other = ~np.eye(len(domain), dtype=bool)
  rows = []
  for layer in found["layers"]:
    load_DE = _by_domain(found, layer)
    domains = specialisation.cosine(load_DE[load_DE.sum(1) > 0])
    documents = specialisation.cosine(layer["load"])
    means = (
      domains[np.triu_indices(len(domains), 1)],
      documents[same & other],
      documents[~same],
    )
    cells = [f"{x.mean():.3f}" if x.size else "–" for x in means]
    rows.append((layer["name"], cells))
  head = ["domains", "documents of one domain", "of two domains"]
  return {"head": head, "rows": rows}


def _lift_map(found: Found, layer: Mapping[str, Any]) -> Markup:
  del found
  lift_EE = routes.lift(layer["pairs"])
  even = np.ones((1, 1))
  return maps.load_map(lift_EE, title=layer["name"], x="expert", y="expert", even=even)


def _kept(found: Found) -> Table:
  """Layers by earlier checkpoints: tokens that kept their experts, and by chance."""
  head = []
  for before in found["stability"]:
    since = f"since step {before['step']}"
    head += [f"same experts {since}", f"shared choices {since}"]
  rows = []
  for n, layer in enumerate(found["layers"]):
    cells = []
    for before in found["stability"]:
      kept = before["layers"][n]
      for name in ("equal", "shared"):
        chance = kept[f"{name}_by_chance"]
        cells.append(f"{100 * kept[name]:.1f} % (chance {100 * chance:.1f} %)")
    rows.append((layer["name"], cells))
  return {"head": head, "rows": rows}
