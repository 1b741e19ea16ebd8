"""Where tests run: on CPU, eight host devices, strict dtypes, little optimisation.

Set before jax makes a backend.  The device count is jax configuration rather than an
environment variable, so that a subprocess started by a test has one device.
"""
# SPDX-License-Identifier: Apache-2.0

import os

import jax

# Tests compile much and compute little.  Without LLVM's optimisations they take half
# the time.  What is fused is emitted through MLIR, whose pipeline is set up anew for
# each of a program's hundreds of fusions; XLA's older emitter, which jax 0.12 has no
# more and therefore ignores the word, compiles a layer in a third of the time.
QUICK = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def prepare() -> None:
  """Sets what is not set: `XLA_FLAGS= pytest` compiles as users do."""
  if "JAX_PLATFORMS" not in os.environ:  # an accelerator run sets it
    os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that a test starts
    jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("XLA_FLAGS", QUICK)
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_numpy_dtype_promotion", "strict")
