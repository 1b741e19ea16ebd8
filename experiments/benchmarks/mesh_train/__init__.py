"""Training steps of whole models over the GPUs of one host: `python -m` runs them."""
# SPDX-License-Identifier: Apache-2.0
