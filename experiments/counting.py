"""Numbers of routes.json: what choices of experts tell, and how long they stay.

Of `experiments.routes`.
"""
# SPDX-License-Identifier: Apache-2.0

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments import choices, lexemes
from experiments.operations._source import Source
from experiments.restoring import manager_of
from experiments.workdir import write_text
from jmoe.analysis import routes, specialisation

FILE = "routes.json"
_VERSION = 2
_BITS = math.log(2)  # nats of one


class _Labels(NamedTuple):
  """A question: what do experts tell of these labels?"""

  labels: str
  text: str  # of which text
  unit: np.ndarray  # i[T] within which tokens are alike; -1: not asked
  label: np.ndarray  # i[U]
  names: tuple[str, ...] = ()  # of the labels, if they are to be drawn


def counted(
  folder: epath.Path,
  cache: Path,
  *,
  documents: int,
  pieces: int,
  draws: int,
  seed: int,
) -> tuple[dict[str, Any], bool]:
  """What routes.json holds, and whether it was made now.

  Args:
    folder: of a run.
    cache: of data sets.
    documents: of a domain.
    pieces: of a document at most.
    draws: of what labels tell by chance.
    seed: of documents and draws.

  Returns:
    `step`, `domains`, `document_domain` [documents]; `layers`: of each `name`, `load`
    [documents,E], `pairs` [E,E], `classes` [classes,E] or None, and `information`: rows
    of `labels`, `text`, `tokens`, `bits`, `by_chance`, `at_most`, `miller_madow`; and
    `stability` for each earlier checkpoint: `step`, and `layers` of the fields of
    `routes.Stability`.

  Raises:
    BadData, BadCheckpoint: the run cannot be read.
    ValueError: it has no sparse layer, or one that makes no choices.
  """
  how = {"documents": documents, "pieces": pieces, "draws": draws, "seed": seed}
  source = Source(folder, cache)
  about = {"version": _VERSION, "step": source.step, "arguments": how}
  old = _old(folder / FILE)
  earlier = [n for n in _steps(folder) if n < source.step]
  about["earlier"] = earlier
  if old is not None and {name: old.get(name) for name in about} == about:
    return old, False
  some = choices.pieces(
    source.encoded.held_out,
    seq=source.run.data.seq,
    documents=documents,
    per_document=pieces,
    seed=seed,
  )
  now = choices.choices(source, some)
  asked = _asked(source, some, now)
  numbers, document_of = np.unique(some.document, return_inverse=True)
  found = about | {
    "domains": list(source.texts.domains),
    "document_domain": source.encoded.held_out.domain[numbers].tolist(),
    "tokens": len(now.piece),
    "classes": list(lexemes.CLASSES),
    "layers": [
      _layer(now, n, document_of[now.piece], len(numbers), asked, draws, seed)
      for n in range(len(now.layers))
    ],
    "stability": [
      {"step": step, "layers": _kept(now, choices.choices(before, some))}
      for step in earlier
      for before in [Source(folder, cache, step)]
    ],
  }
  write_text(folder / FILE, json.dumps(found))
  return found, True


def _layer(
  now: choices.Choices,
  number: int,
  document_T: np.ndarray,
  documents: int,
  asked: list[_Labels],
  draws: int,
  seed: int,
) -> dict[str, Any]:
  uses_TE = now.uses(number)
  of_classes = [row for row in asked if row.names]
  return {
    "name": now.layers[number][0],
    "load": routes.load(document_T, uses_TE, num_labels=documents).tolist(),
    "pairs": routes.pairs(uses_TE).tolist(),
    "classes": _load(of_classes[0], uses_TE).tolist() if of_classes else None,
    "information": [_told(row, uses_TE, draws, seed) for row in asked],
  }


def _load(row: _Labels, uses_TE: np.ndarray) -> np.ndarray:
  label_T = np.where(row.unit >= 0, row.label[row.unit], -1)
  return routes.load(label_T, uses_TE, num_labels=int(row.label.max()) + 1)


def _told(row: _Labels, uses_TE: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
  """A row of `information`, in bits."""
  load_LE = _load(row, uses_TE)
  chance = routes.information_by_chance(
    row.unit, uses_TE, row.label, num_labels=len(load_LE), draws=draws, seed=seed
  )
  label_L, expert_E = load_LE.sum(1), load_LE.sum(0)
  most = min(specialisation.load_entropy(x) for x in (label_L, expert_E))
  nats = {
    "bits": specialisation.mutual_information(load_LE),
    "by_chance": chance.mean(),
    "chance_at_most": chance.max(),
    "miller_madow": specialisation.miller_madow(load_LE),
    "of_labels": specialisation.load_entropy(label_L),
    "at_most": most,
  }
  about = {
    "labels": row.labels,
    "text": row.text,
    "tokens": int((row.unit >= 0).sum()),
    "number": int((label_L > 0).sum()),
  }
  return about | {name: float(x) / _BITS for name, x in nats.items()}


def _kept(now: choices.Choices, before: choices.Choices) -> list[dict[str, Any]]:
  return [
    {"name": name, **routes.stability(before.uses(n), now.uses(n))._asdict()}
    for n, (name, *_) in enumerate(now.layers)
  ]


def _asked(source: Source, some: choices.Pieces, now: choices.Choices) -> list[_Labels]:
  """The questions; those on Python only where a domain is mostly Python."""
  domain_of = source.encoded.held_out.domain
  numbers, document_of = np.unique(some.document, return_inverse=True)
  document_T = document_of[now.piece]
  domain_D = np.asarray(domain_of[numbers], np.int64)
  each_T = np.arange(len(now.token))
  asked = [
    _Labels("domain", "all", document_T, domain_D),
    _Labels("token", "all", each_T, now.token.astype(np.int64)),
  ]
  kind_T, lexeme_T = _python(source, some, now, domain_D[document_T])
  is_python_T = kind_T >= 0
  if not is_python_T.any():
    return asked
  python_T = np.where(is_python_T, document_T, -1)
  if len(np.unique(domain_D[document_T[is_python_T]])) > 1:
    # Chance draws labels of these documents alone.
    units = _dense(python_T, domain_D[document_T])
    asked.append(_Labels("domain", "Python", *units))
  # Pieces of a document are its units: do two have more in common than their words?
  piece_T = np.where(is_python_T, now.piece, -1)
  asked.append(_Labels("document", "Python", *_dense(piece_T, document_T)))
  asked.append(
    _Labels("class", "Python", *_dense(lexeme_T, kind_T), names=lexemes.CLASSES)
  )
  asked.append(
    _Labels("token", "Python", *_dense(np.where(is_python_T, each_T, -1), now.token))
  )
  return asked


def _dense(unit_T: np.ndarray, label_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(units numbered from 0, their labels); those below 0 stay so."""
  kept_T = unit_T >= 0
  _, first_U, dense_N = np.unique(
    unit_T[kept_T], return_index=True, return_inverse=True
  )
  units_T = np.full(len(unit_T), -1, np.int64)
  units_T[kept_T] = dense_N
  return units_T, np.asarray(label_T[kept_T][first_U], np.int64)


def _python(
  source: Source, some: choices.Pieces, now: choices.Choices, domain_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(i[T] class, i64[T] lexeme) of Python tokens, -1 of others.

  A token is of the class of its last byte: byte-pair tokens begin with their space.
  """
  T = len(now.token)
  kind_T, lexeme_T = np.full(T, -1), np.full(T, -1, np.int64)
  held_out = source.encoded.held_out
  begins = np.concatenate([[0], held_out.ends[:-1]])
  domains: dict[int, list[bool]] = {}
  for number in np.unique(some.document).tolist():
    text = bytes(source.texts.held_out[number]["text"])
    known = lexemes.lexemes(text)
    domains.setdefault(int(held_out.domain[number]), []).append(known is not None)
    if known is None or not len(known.kind):
      continue
    tokens = held_out.tokens[begins[number] : held_out.ends[number]]
    lengths = source.words.byte_lengths[np.asarray(tokens)]
    last = np.cumsum(lengths) - 1  # byte of each token
    own = np.nonzero(some.document[now.piece] == number)[0]
    token = some.first[now.piece[own]] + now.place[own]
    is_text = lengths[token] > 0
    own, at = own[is_text], last[token[is_text]]
    kind_T[own] = known.kind[at]
    lexeme_T[own] = (number << 32) + known.number[at].astype(np.int64)
  mostly = [d for d, found in domains.items() if np.mean(found) > 0.5]
  other_T = ~np.isin(domain_T, mostly)
  kind_T[other_T] = lexeme_T[other_T] = -1
  return kind_T, lexeme_T


def _steps(folder: epath.Path) -> list[int]:
  manager = manager_of(folder / "checkpoints", ours=False)
  try:
    return sorted(manager.all_steps())
  finally:
    manager.close()


def _old(path: epath.Path) -> dict[str, Any] | None:
  """What was measured before; None if there is nothing, or nothing that can be read."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None
