"""Every target there is, by the name the command line calls it."""

from __future__ import annotations

from collections.abc import Mapping

from hardware.targets.generic_int8 import GENERIC_INT8
from hardware.targets.lava import LAVA, NETX
from hardware.targets.loihi2 import LOIHI2
from hardware.targets.rules import Target

TARGETS: Mapping[str, Target] = {target.name: target for target in (LOIHI2, GENERIC_INT8, LAVA, NETX)}
