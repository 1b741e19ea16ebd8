"""What a model costs and what it does; arrays in, numbers out, never inside jit.

cost             parameters and FLOPs, total and active, without allocating anything
modularity       how much of a feed-forward's output a few of its hidden units hold
routes           token by token: chance, experts used together, routes that stay
specialisation   which experts serve which domains: mutual information, shares, load
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.analysis import cost, modularity, routes, specialisation

__all__ = ["cost", "modularity", "routes", "specialisation"]
