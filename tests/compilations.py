"""Every compilation of this process, in order.

jax's own events count them; the size of a jitted function's cache does not, as jax may
empty it or leave it empty.
"""
# SPDX-License-Identifier: Apache-2.0

import jax

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)
