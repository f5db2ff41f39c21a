"""Other systems on the same skeleton: the family's decoder and sizes, another attention or memory.

Local attention alone is no class of its own: it is an `infini_*` model whose gates are shut (`memory_off`, or
`memory: false` in a recipe).
"""

from infini_attention.baselines.families import BASELINES
from infini_attention.baselines.loading import with_window
from infini_attention.baselines.memory_size import compression, memory_floats

__all__ = ["BASELINES", "compression", "memory_floats", "with_window"]
