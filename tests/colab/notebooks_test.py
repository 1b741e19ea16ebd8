"""The notebooks are those of their scripts, and run from the first cell to the last."""

import importlib.util
import os
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
COLAB = ROOT / "colab"
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def _build():
  spec = importlib.util.spec_from_file_location("build", COLAB / "build.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


build = _build()


def test_every_script_has_its_notebook_and_none_is_stale():
  assert [path.stem for path in build.scripts()] == [
    path.stem for path in sorted(COLAB.glob("*.ipynb"))
  ]
  assert build.stale() == []


def test_a_changed_script_is_stale(tmp_path, monkeypatch):
  script = tmp_path / "01_x.py"
  script.write_text((COLAB / "01_a_layer_by_hand.py").read_text())
  script.with_suffix(".ipynb").write_text(build.notebook(script))
  monkeypatch.setattr(build, "_HERE", tmp_path)
  assert build.stale() == []
  script.write_text(script.read_text().replace("T, D, E, K = 16", "T, D, E, K = 15"))
  assert build.stale() == ["01_x.ipynb"]


def test_the_readme_leads_to_the_notebooks():
  readme = (ROOT / "README.md").read_text()
  for script in build.scripts():
    assert f"blob/main/colab/{script.stem}.ipynb" in readme


@pytest.mark.notebook
@pytest.mark.parametrize("script", build.scripts(), ids=lambda path: path.stem)
def test_notebook_runs(script, tmp_path, monkeypatch):
  """On a CPU; those that train with the smallest configuration, or few steps."""
  monkeypatch.setenv("JMOE_NOTEBOOK_CONFIG", "micro")
  monkeypatch.setenv("JMOE_NOTEBOOK_STEPS", "60")
  # Compiling is most of the time.
  monkeypatch.setenv("XLA_FLAGS", QUICK, prepend=" ")
  monkeypatch.setenv("JMOE_NOTEBOOK_RUNS", str(tmp_path))
  monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  made = nbformat.reads(build.notebook(script), as_version=4)
  client = nbclient.NotebookClient(
    made, timeout=300, resources={"metadata": {"path": str(COLAB)}}
  )
  client.execute()
  outputs = [out for cell in made.cells for out in cell.get("outputs", ())]
  assert any("data" in out for out in outputs)  # something to look at
  if script.stem.startswith("02"):
    [run] = tmp_path.iterdir()
    assert (run / "summary.json").exists() and (run / "report.html").exists()
