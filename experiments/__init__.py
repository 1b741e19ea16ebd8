"""Runs: what is trained, on what, and how it is measured; `jmoe` needs none of it."""
# SPDX-License-Identifier: Apache-2.0
