"""What carries rows over a mesh, by the name that `--strategy` gives it."""
# SPDX-License-Identifier: Apache-2.0

import inspect

from experiments.errors import BadConfig
from jmoe import dispatch
from jmoe.use import Use, nearest, use

GATHER = "gather"  # matrices come to the tokens, and no row travels
_OWN_FIRST = "+own_first"
# Name -> what carries rows, with the keywords that the name stands for.
STRATEGIES: dict[str, Use | None] = {
  **{
    name: use(function)
    for name, function in vars(dispatch).items()
    if getattr(function, "exchanges", False) or getattr(function, "gspmd", False)
  },
  "all_gather" + _OWN_FIRST: use(dispatch.all_gather, own_first=True),
  "all_to_all" + _OWN_FIRST: use(dispatch.all_to_all, own_first=True),
  GATHER: None,
}
_OVERLAP = "+overlap="
_IN_CHUNKS = tuple(
  name
  for name, used in STRATEGIES.items()
  if used is not None
  and not used.kwargs  # `own_first` hides exchanges without chunks
  and "overlap" in inspect.signature(used.function).parameters
)


def carrier(name: str) -> Use | None:
  """What carries rows, by one of `STRATEGIES`, or "all_to_all+overlap=2".

  Raises:
    BadConfig: there is no such strategy.
  """
  base, chunked, chunks = name.partition(_OVERLAP)
  if base not in STRATEGIES:
    raise BadConfig(f"--strategy {name}: unknown; {nearest(base, STRATEGIES)}")
  if not chunked:
    return STRATEGIES[base]
  if base not in _IN_CHUNKS:
    raise BadConfig(
      f"--strategy {name}: {base} does not send in chunks; use "
      f"{' or '.join(f'{known}{_OVERLAP}2' for known in _IN_CHUNKS)}."
    )
  if not chunks.isdecimal() or int(chunks) < 1:
    raise BadConfig(
      f"--strategy {name}: give a number of chunks, as in {base}{_OVERLAP}2."
    )
  return use(getattr(dispatch, base), overlap=int(chunks))


def name_of(used: Use) -> str:
  """The name of what carries rows, as `carrier` takes it."""
  chunks = used.kwargs.get("overlap", 1)
  own_first = _OWN_FIRST if used.kwargs.get("own_first") else ""
  return used.name + own_first + (f"{_OVERLAP}{chunks}" if chunks > 1 else "")
