"""Operations on trained models: a model in, a model out, and a receipt.

frame    `Model`, `Block`, `Layer`: what operations take and give
receipt  what was kept, parameters before and after, how far outputs moved

An operation changes no array that it was given.  `python -m experiments.surgery` runs
them on checkpoints.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.surgery.frame import Block as Block
from jmoe.surgery.frame import Layer as Layer
from jmoe.surgery.frame import Model as Model
from jmoe.surgery.frame import blocks as blocks
from jmoe.surgery.frame import layers as layers
from jmoe.surgery.frame import model_of as model_of
from jmoe.surgery.frame import on_layers as on_layers
from jmoe.surgery.frame import rebuilt as rebuilt
from jmoe.surgery.receipt import Receipt as Receipt
from jmoe.surgery.receipt import Sample as Sample
from jmoe.surgery.receipt import moved as moved
from jmoe.surgery.receipt import receipt as receipt
