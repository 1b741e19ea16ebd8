"""The handbook: packages by release, and the text in them; with stand-ins for apt."""
# SPDX-License-Identifier: Apache-2.0

import gzip
import shutil
import subprocess

import pytest

from experiments.corpora import __main__ as build, debian, handbook, markup
from experiments.errors import BadData

PAGE = """<html><head><title>x</title></head><body><aside>MENU</aside>
<div id="DisplayArea" itemprop="x"><h1>{title}</h1>
<p>Press <span hidden="true" id="MACx" class="MAC"><span class="keycode">Command</span>
</span><span class="keycode">Ctrl</span>+F&nbsp;to find &lt;text&gt;.</p>{body}</div>
<div id="DonationFrame"></div><footer><div id="DEBUG">not this</div></footer></body>"""

ROFF = r""".\" a comment
.TH brk 2 2022-12-04 "Linux"
.SH NAME
brk, sbrk \- change the size
.SH SYNOPSIS
.nf
.BI "int brk(void *" addr );
.fi
.PP
.BR brk ()
sets \fIthe end\fP of what \(aqaddr\(aq says.
.TS
l l.
a	\e0
.TE
.if t \{\
.ft CW
only in print
.\}
.IP \(bu 3
Last\
 line."""


def put(path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  data = text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def sentences(name: str, count: int = 12) -> str:
  return "".join(
    f"<p>Sentence number {n} of the page {name}.</p>" for n in range(count)
  )


@pytest.fixture
def release(tmp_path, monkeypatch):
  """Packages in which two pages are translated and one is not; there is no Korean."""
  packages = tmp_path / "packages"
  for language in ("en-us", "de", "es", "fr", "ru", "ja", "zh-cn"):
    share = packages / f"libreoffice-help-{language}" / "usr/share/libreoffice/help"
    for name in ("one", "two", "same"):
      body = sentences("same" if name == "same" else f"{name} {language}")
      put(
        share / language / "text/a" / f"{name}.html", PAGE.format(title=name, body=body)
      )
  doc = packages / "python3.12-doc/usr/share/doc"
  put(doc / "python3.12/html/_sources/library.rst.txt", "Library. " * 40)
  (doc / "python3.12-doc").mkdir()
  (doc / "python3.12-doc/html").symlink_to("../python3.12/html")
  kernel = packages / "linux-doc-6.12/usr/share/doc/linux-doc-6.12/Documentation"
  put(kernel / "mm/page.rst.gz", "Pages. " * 40)
  put(kernel / "mm/again.rst.gz", "Pages. " * 40)
  put(kernel / "translations/it/mm.rst.gz", "Pagine. " * 40)
  put(packages / "manpages/usr/share/man/man2/brk.2.gz", ROFF + "\n" + "More. " * 40)
  put(packages / "manpages/usr/share/man/man2/short.2.gz", ".so man2/brk.2")
  glosses = "".join(
    f"{n:08} 02 r 02 be_fore 0 b(a) 1 000 | earlier in time; {n}  \n" for n in range(40)
  )
  for part in ("noun", "verb", "adj", "adv"):
    head = "  1 The licence.\n"
    lines = head + (glosses if part == "adv" else "")
    put(packages / f"wordnet-base/usr/share/wordnet/data.{part}", lines)
  names = [p.name for p in packages.iterdir()]
  # What apt knows beside them: an older kernel's, and names that only look alike.
  known = [*names, "linux-doc-6.9", "linux-doc", "python3-doc", "manpages-tr"]

  def run(command, **_):
    tool, *rest = command
    if rest[0] == "pkgnames":
      return subprocess.CompletedProcess(command, 0, "\n".join(known), "")
    assert (tool, rest[0]) == ("apt-cache", "show")
    return subprocess.CompletedProcess(command, 0, f"Package: {rest[1]}", "")

  def fetch(wanted, folder):
    assert set(wanted) == set(names)
    return {
      name: debian.Unpacked(
        name, "1.0-1", shutil.copytree(packages / name, folder / name, symlinks=True)
      )
      for name in wanted
    }

  monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
  monkeypatch.setattr(debian.subprocess, "run", run)
  monkeypatch.setattr(debian, "fetch", fetch)
  monkeypatch.setattr(
    handbook.embedded, "modules", lambda: iter([("m.py", tmp_path / "m.py")])
  )
  (tmp_path / "m.py").write_text("x = 1  # a module\n" * 20)


def test_the_newest_of_a_release_is_taken_and_what_it_lacks_is_named(release, capsys):
  names, missing = debian.resolve(
    [r"linux-doc-([0-9]+)\.([0-9]+)", r"python([0-9]+)\.([0-9]+)-doc", "manpages-dev"]
  )
  assert list(names.values()) == ["linux-doc-6.12", "python3.12-doc"]
  assert missing == ["manpages-dev"]


def test_documents_are_counted_by_why_they_were_left_out(release, chosen, capsys):
  found = handbook.found("", max_bytes=1 << 30)
  docs = [doc for some in found.domains.values() for doc in some]
  ids = {doc.id for doc in docs}
  assert {f"de/a/{name}.html" for name in ("one", "two")} < ids
  assert "de/a/same.html" not in ids and "en/a/same.html" in ids
  assert "python-docs/library.rst.txt" in ids and "kernel-docs/mm/page.rst" not in ids
  assert "kernel-docs/mm/again.rst" in ids and "man-pages/man2/brk.2" in ids
  assert {"dictionary/02/0", "dictionary/02/1", "python-code/m.py"} < ids
  assert not any("translations" in id or id.startswith("ko/") for id in ids)
  dropped = found.facts["dropped"]
  untranslated = dict.fromkeys(("de", "es", "fr", "ru", "ja", "zh"), 1)
  assert dropped["untranslated pages"] == untranslated
  assert dropped["exact duplicates"] == {"kernel-docs": 1}
  assert dropped["under 200 bytes"] == {"man-pages": 1}
  assert dropped["packages"] == ["libreoffice-help-ko", "manpages-dev"]
  assert found.facts["versions"]["linux-doc-6.12"] == "1.0-1"
  warned = capsys.readouterr().err
  assert warned.count("\n") == 2 and "no package libreoffice-help-ko" in warned


def test_a_page_is_on_one_side_in_every_language(release, chosen):
  sides: dict[str, set[bool]] = {}
  for doc in chosen("handbook"):
    if doc.source.startswith("a/"):
      sides.setdefault(doc.source, set()).add(doc.held_out)
  assert len(sides) == 3 and all(len(side) == 1 for side in sides.values())


def test_two_builds_have_one_digest(release, tmp_path, capsys):
  shown = []
  for n in range(2):
    out = tmp_path / f"{n}.jsonl.xz"
    assert build.main(["handbook", "--out", str(out)]) == 0
    shown.append(capsys.readouterr().out.partition("digest ")[2][:16])
  assert shown[0] == shown[1] and len(shown[0]) == 16


def test_without_apt_one_line_says_what_to_do(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert build.main(["handbook", "--out", str(tmp_path / "x.xz")]) == 2
  shown = capsys.readouterr().err
  assert "there is no apt-cache here" in shown and "packed:" in shown
  assert shown.count("\n") == 1


def test_without_package_lists_one_line_says_what_to_do(monkeypatch, tmp_path):
  monkeypatch.setattr(shutil, "which", lambda tool: tool)
  nothing = subprocess.CompletedProcess([], 0, "", "")
  monkeypatch.setattr(debian.subprocess, "run", lambda *_, **__: nothing)
  with pytest.raises(BadData, match="run apt-get update"):
    handbook.found("", max_bytes=1)


def test_a_help_page_is_its_article_without_menus():
  text = markup.help_page(PAGE.format(title="Find", body="<p>End.</p>"))
  assert text == "Find\nPress Ctrl+F to find <text>.\nEnd."


def test_a_manual_page_is_its_words_without_macros():
  assert markup.manual_page(ROFF) == (
    "brk 2\n\nNAME\nbrk, sbrk - change the size\n\nSYNOPSIS\nint brk(void *addr);\n\n"
    "brk() sets the end of what 'addr' says.\na\t\\0\n\n*\nLast line."
  )
  assert markup.manual_page(".so man2/brk.2\n") == ""


def test_a_gloss_has_its_words_before_it():
  line = '00002142 02 r 03 BC 0 be_fore 0 b(a) 1 000 | of an era; "in 200 BC"  '
  assert markup.gloss(line) == ("02", 'BC, be fore, b: of an era; "in 200 BC"')
