"""EMoE on a pretrained encoder: is fine-tuning better through groups of hidden units?

pack     weights and texts of two packages in one file, for a machine without network
texts    which texts train, choose and test
arms     what is compared, as parameters and settings
train    fine-tuning of all seeds and rates of an arm as one program
jobs     what is to do and what is done, kept as JSON lines
work     a job done, programs compiled ahead
run      the jobs, one after the other
table    what they say: accuracies, paired differences, claims
held     how much of the outputs few groups hold, before any training
"""
# SPDX-License-Identifier: Apache-2.0
