"""Published layers as data: `presets.mixtral.layer(d_model=..., d_ff=...)`.

One file per system, named after it, with functions that return a `MoEConfig`: where
each number comes from, what its paper leaves out, and `LOSS_WEIGHTS` for
`jmoe.total_loss` (of a load balance that is 1 at balance, summed over layers).  Change
a preset with `dataclasses.replace`.
"""
# SPDX-License-Identifier: Apache-2.0

from types import ModuleType
from typing import Any

from jmoe.presets import dag_moe as dag_moe
from jmoe.presets import dbrx as dbrx
from jmoe.presets import deepseek_v2 as deepseek_v2
from jmoe.presets import deepseek_v3 as deepseek_v3
from jmoe.presets import emo as emo
from jmoe.presets import emoe as emoe
from jmoe.presets import expert_choice as expert_choice
from jmoe.presets import fairseq_moe as fairseq_moe
from jmoe.presets import glam as glam
from jmoe.presets import gpt_oss as gpt_oss
from jmoe.presets import grok_1 as grok_1
from jmoe.presets import gshard as gshard
from jmoe.presets import hash_layers as hash_layers
from jmoe.presets import limoe as limoe
from jmoe.presets import llama_4 as llama_4
from jmoe.presets import megablocks as megablocks
from jmoe.presets import mixtral as mixtral
from jmoe.presets import mmoe as mmoe
from jmoe.presets import moe_plus_plus as moe_plus_plus
from jmoe.presets import olmoe as olmoe
from jmoe.presets import pangu_sigma as pangu_sigma
from jmoe.presets import pr_moe as pr_moe
from jmoe.presets import qwen2_moe as qwen2_moe
from jmoe.presets import qwen3_moe as qwen3_moe
from jmoe.presets import soft_moe as soft_moe
from jmoe.presets import st_moe as st_moe
from jmoe.presets import switch as switch
from jmoe.presets import tutel as tutel
from jmoe.presets import vmoe as vmoe
from jmoe.presets import zcode_m3 as zcode_m3
from jmoe.use import nearest


def __getattr__(name: str) -> Any:
  known = [key for key, value in globals().items() if isinstance(value, ModuleType)]
  raise AttributeError(f"module 'jmoe.presets' has no {name!r}; {nearest(name, known)}")
