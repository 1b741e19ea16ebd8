"""Operations on trained models: a model in, a model out, and a receipt.

compose  models cut out of one, as one again
cut      a layer or model with some of its experts
extract  which experts: those that some text asks for, or at random
frame    `Model`, `Block`, `Layer`: what operations take and give
cluster  dense feed-forwards in groups of hidden units (EMoE)
encoders the same in encoders
upcycle  dense feed-forwards copied into experts; experts copied (`expand`)
prune    scores by which experts are chosen, REAP's among them
merge    models averaged, their experts side by side, dense models as experts
flex     experts trained apart beside a public model (FlexOlmo)
grow     new experts beside those of a trained model
to_dense one feed-forward of a layer's experts
moments  an optimizer's state after an operation that takes or copies experts
shells   layers of one's own models, of Flax Linen or NNX, as operations take them
layout   what lies over a mesh is laid out again
walk     a model run on calibration text, scored and changed layer by layer
receipt  what was kept, parameters before and after, how far outputs moved

An operation changes no array that it was given.  `python -m experiments.surgery` runs
them on checkpoints.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.surgery import cluster as cluster
from jmoe.surgery import encoders as encoders
from jmoe.surgery import flex as flex
from jmoe.surgery import grow as grow
from jmoe.surgery import merge as merge
from jmoe.surgery import prune as prune
from jmoe.surgery import upcycle as upcycle
from jmoe.surgery.compose import compose as compose
from jmoe.surgery.cut import cut as cut
from jmoe.surgery.cut import cut_model as cut_model
from jmoe.surgery.cut import of_domain as of_domain
from jmoe.surgery.extract import Extracted as Extracted
from jmoe.surgery.extract import at_random as at_random
from jmoe.surgery.extract import easy_ep as easy_ep
from jmoe.surgery.extract import in_one_pass as in_one_pass
from jmoe.surgery.extract import layerwise as layerwise
from jmoe.surgery.extract import mean_probability as mean_probability
from jmoe.surgery.frame import Block as Block
from jmoe.surgery.frame import Layer as Layer
from jmoe.surgery.frame import Model as Model
from jmoe.surgery.frame import blocks as blocks
from jmoe.surgery.frame import layer_configs as layer_configs
from jmoe.surgery.frame import layers as layers
from jmoe.surgery.frame import model_of as model_of
from jmoe.surgery.frame import on_layers as on_layers
from jmoe.surgery.frame import rebuilt as rebuilt
from jmoe.surgery.moments import moments as moments
from jmoe.surgery.receipt import Receipt as Receipt
from jmoe.surgery.receipt import Sample as Sample
from jmoe.surgery.receipt import compared as compared
from jmoe.surgery.receipt import moved as moved
from jmoe.surgery.receipt import receipt as receipt
from jmoe.surgery.shells import alone as alone
from jmoe.surgery.shells import of_linen as of_linen
from jmoe.surgery.shells import of_nnx as of_nnx
from jmoe.surgery.shells import on_linen as on_linen
from jmoe.surgery.shells import on_nnx as on_nnx
from jmoe.surgery.shells import to_linen as to_linen
from jmoe.surgery.shells import to_nnx as to_nnx
from jmoe.surgery.to_dense import feed_forward as feed_forward
from jmoe.surgery.to_dense import to_dense as to_dense
from jmoe.surgery.walk import Seen as Seen
from jmoe.surgery.walk import fed as fed
from jmoe.surgery.walk import walk as walk
