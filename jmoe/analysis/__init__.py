"""What a model costs and what it does; arrays in, numbers out, never inside jit.

cost   parameters and FLOPs, total and active, without allocating anything
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.analysis import cost

__all__ = ["cost"]
