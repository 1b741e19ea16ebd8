"""All that is measured over the GPUs of one host, in one call: `python -m` runs it."""
# SPDX-License-Identifier: Apache-2.0
