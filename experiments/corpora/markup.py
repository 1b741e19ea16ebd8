"""Plain text of LibreOffice's help pages, of manual pages and of WordNet's lines."""
# SPDX-License-Identifier: Apache-2.0

import html
import re

_OTHER_KEY = re.compile(
  r'<span[^>]*class="MAC"[^>]*>(?:<span[^>]*>[^<]*</span>|[^<])*</span>'
)
_UNSHOWN = re.compile(r"<(script|style|head)\b.*?</\1>|<!--.*?-->", re.DOTALL)
_BLOCK = re.compile(r"</?(?:p|div|h[1-6]|li|ul|ol|tr|table|pre|br|dt|dd)\b[^>]*>")
_CELL = re.compile(r"</?t[dh]\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")

_PAIRS = """
  aq ' dq " bu * em -- en - ha ^ ti ~ rs \\ lq " rq " oq ' cq ' co (C) rg (R) tm (TM)
  ga ` -> -> <- <- >= >= <= <= != != +- +- mu x mc µ 12 1/2 or | ss ß Po £ -D Ð de °
  Fo << Fc >> if infinity *p pi""".split()
_GLYPHS: dict[str, str] = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
_ESCAPE = re.compile(
  r"""\\(?: f(?:\[[^]]*\]|\(..|.)  # a font
      | s[-+]?[0-9]+ | [vhwDoX]'[^']*' | [|^&%:c,/)] | d | u | [zk].
      | \[(?P<long>[^]]*)\] | \((?P<short>..) | \*(?:\[[^]]*\]|\(..|.)
      | n(?:\[[^]]*\]|\(..|.) | (?P<one>.) )""",
  re.VERBOSE,
)
_ONE = {
  "e": "\\",
  "-": "-",
  " ": " ",
  "~": " ",
  "0": " ",
  "'": "'",
  "`": "`",
  "t": "\t",
}
_QUOTED = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_ALTERNATING = ("BR", "RB", "BI", "IB", "IR", "RI")
_PARAGRAPHS = ("PP", "LP", "P", "sp", "HP", "TP")
_NO_FILL, _FILL = ("nf", "EX", "TS"), ("fi", "EE", "TE")


def help_page(page: str) -> str:
  """The article of a LibreOffice help page, without the menus around it."""
  start = page.find('id="DisplayArea"')
  ends = [
    n for mark in ("DonationFrame", "DEBUG") if (n := page.find(f'id="{mark}"')) > 0
  ]
  if start < 0 or not ends:
    return ""
  inside = page[page.index(">", start) + 1 : page.rindex("<", 0, min(ends))]
  return web_page(_OTHER_KEY.sub("", inside))


def web_page(page: str) -> str:
  """The text of HTML, a line for each of its blocks."""
  inside = " ".join(_UNSHOWN.sub("", page).split())  # lines are those of the markup
  inside = _CELL.sub(" ", _BLOCK.sub("\n", inside))
  text = html.unescape(_TAG.sub("", inside))
  lines = (" ".join(line.split()) for line in text.splitlines())
  return "\n".join(line for line in lines if line)


def manual_page(source: str) -> str:
  """The words of a page in roff's `man` macros; "" if it only names another page."""
  lines: list[str] = []
  fills = True  # lines run on until one is broken
  broken = True
  in_format = False  # the lines of a table that say how it looks
  skipped = 0  # open braces of a condition or lines of a macro's definition
  for line in source.replace("\\\n", "").splitlines():
    if skipped:
      skipped += line.count(r"\{") - line.count(r"\}") - (line.strip() == "..")
      continue
    if in_format:
      in_format = not line.rstrip().endswith(".")
      continue
    macro, _, rest = line[1:].lstrip().partition(" ")
    if not line.startswith((".", "'")):
      found, breaks = [_plain(line)], line.startswith((" ", "\t")) or not line
    elif macro in ("if", "ie", "el"):
      skipped = max(0, line.count(r"\{") - line.count(r"\}"))
      continue
    elif macro in ("de", "ig"):
      skipped = 1
      continue
    elif macro == "so":
      return ""
    else:
      in_format = macro == "TS"
      fills = macro in _FILL or (fills and macro not in _NO_FILL)
      found, breaks = _macro(macro, rest)
    if found and fills and not (broken or breaks):
      lines[-1] += f" {found.pop(0)}"
    lines += found
    broken = breaks or (broken and not found)
  text = "\n".join(line.rstrip() for line in lines)
  return re.sub(r"\n{3,}", "\n\n", text).strip()


def _macro(macro: str, rest: str) -> tuple[list[str], bool]:
  """(lines of text that a macro stands for, whether they stand apart)."""
  words = [_plain(a or b) for a, b in _QUOTED.findall(rest.partition(r"\"")[0])]
  if macro == "TH":
    return [" ".join(words[:2])], True
  if macro in ("SH", "SS"):
    return ["", " ".join(words)], True
  if macro == "IP":
    return ["", *words[:1]], True
  if macro in _PARAGRAPHS:
    return [""], True
  if macro in _ALTERNATING:
    return ["".join(words)], False
  if macro in ("B", "I", "SB", "SM", "UR", "MT", "SY", "q"):
    return [" ".join(words)] if words else [], False
  if macro in ("UE", "ME"):
    return words[:1], False
  return [], macro in ("br", "TQ", "RS", "RE", *_FILL, *_NO_FILL)


def _plain(line: str) -> str:
  line = re.sub(r'\\".*', "", line)
  return _ESCAPE.sub(_escaped, line)


def _escaped(match: re.Match[str]) -> str:
  name = match["long"] or match["short"]
  if name is not None:
    if re.fullmatch("u[0-9A-F]{4,6}", name):
      return chr(int(name[1:], 16))
    accented = re.fullmatch("([\"'`^:~,o])([A-Za-z])|([A-Za-z])([\"'`^:~,o])", name)
    return _GLYPHS.get(name, accented[2] or accented[3] if accented else "")
  return _ONE.get(match["one"] or "", "")


def gloss(line: str) -> tuple[str, str]:
  """(number of its file, "words: definition") of a line of WordNet's data."""
  entry, _, definition = line.partition(" | ")
  fields = entry.split()
  words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
  names = [re.sub(r"\([a-z]+\)$", "", word).replace("_", " ") for word in words]
  return fields[1], f"{', '.join(names)}: {definition.strip()}"
