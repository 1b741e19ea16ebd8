"""A whole training step of OLMoE-1B-7B, jmoe's beside that of transformers."""
# SPDX-License-Identifier: Apache-2.0
