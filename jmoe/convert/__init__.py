"""Published checkpoints as models of `jmoe.surgery`, and back; a file a system.

Tensors come by name from any reader of files, as `tensors.read`; nothing is downloaded.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.convert import bert as bert
from jmoe.convert import emo as emo
from jmoe.convert import tensors as tensors
