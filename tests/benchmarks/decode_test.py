"""Few tokens against reading their experts: the bound, and the way of the figures."""
# SPDX-License-Identifier: Apache-2.0

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import decode, shapes, tracing


def test_the_target_is_of_the_experts_that_were_chosen():
  shape = shapes.SHAPES["qwen3"]
  count, num_bytes = decode.touched(shape, np.array([[3, 5], [5, 7]]))
  assert (count, num_bytes) == (3, 3 * 3 * 2048 * 768 * 2)
  np.testing.assert_allclose(
    decode.target(num_bytes, 1e12), 1.5 * num_bytes / 1e12 + 4e-5
  )


def test_every_number_of_tokens_is_measured_and_right(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(decode, "DRAWS", 2)
  out = tmp_path / "figures.json"
  command = ["--shape", "tiny", "--tokens", "1", "9", "--rounds", "1", "--queued"]
  assert decode.main([*command, "--out", str(out)]) == 0
  result = json.loads(out.read_text())
  assert [row["tokens"] for row in result["rows"]] == [1, 9]
  assert result["rows"][0]["experts"] == 2
  for row in result["rows"]:
    assert 0 < row["error"] < 1e-2
    np.testing.assert_allclose(row["of_target"], row["us"] / row["target_us"])
  monkeypatch.setattr(decode, "_WRONG", 1e-9)
  assert decode.main(command) == 3
  assert "wrong result of 1, 9 tokens" in capsys.readouterr().err


def test_no_tokens_are_refused_in_one_line(capsys):
  with pytest.raises(SystemExit) as caught:
    decode.main(["--shape", "tiny", "--tokens", "0"])
  assert caught.value.code == 2
  assert "--tokens 0 is less than one token" in capsys.readouterr().err


def test_a_trace_is_read_where_there_is_no_device_in_it(capsys):
  call = jax.jit(jnp.sin).lower(jnp.ones(8)).compile()
  assert tracing.spent(lambda: call(jnp.ones(8))) == 0
  assert tracing.shown(call, [jnp.ones(8)], 3) == []
