"""Published checkpoints as models of `jmoe.surgery.Model`, and back; a file a system.

Tensors come by name from any reader of files; nothing here reads or downloads them.
"""
# SPDX-License-Identifier: Apache-2.0

from jmoe.convert import emo as emo
