"""Assignment: Routing -> Plan, the queue of every expert, cut at capacity."""
# SPDX-License-Identifier: Apache-2.0

from jmoe.assign import capacity as capacity
from jmoe.assign import priority as priority
from jmoe.assign import renormalise as renormalise
from jmoe.assign.plan import assign as assign
