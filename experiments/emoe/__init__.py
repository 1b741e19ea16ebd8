"""EMoE on pretrained models: is fine-tuning better through groups of hidden units?

pack      weights and texts of two packages in one file, for a machine without network
texts     an encoder's: which texts train, choose and test
lm        a language model's: which rows of text do
material  what both are, for the rest
kinds     what the rest asks of a kind of model
encoder   its answers for an encoder under a head
decoder   those for a language model
arms      what is compared, as parameters and settings
train     fine-tuning of all seeds and rates of an arm as one program
jobs      what is to do and what is done, kept as JSON lines
work      a job done, programs compiled ahead
run       the jobs, one after the other
table     what they say: means, paired differences, claims
held      how much of an encoder's outputs few groups hold, before any training
"""
# SPDX-License-Identifier: Apache-2.0
