"""What a training step over many chips would need, by arithmetic: no hardware.

chips        what each chip can do, one row each, with sources
rates        which part of that is reached: the planner's only calibration
topology     which chips, how they are wired, where a mesh axis lies in them
mesh         sizes of mesh axes, checked against chips and model
models       names -> runs: configurations of `experiments.configs`, published models
sharding     which part of each parameter a device holds
drops        popularity of experts, and what overflows their slots
work         FLOPs of a step by kind
memory       bytes of a device, term by term
exchanges    what sparse layers send, by strategy
dense        what all the rest sends
step         all of it for one run, strategies ranked, the largest batch
compiled     the real step through a compiler for TPUs, beside the estimate
sharded      that step over a mesh
report       as text
"""
# SPDX-License-Identifier: Apache-2.0
