"""The model class, its variants, and their cost."""

from .cost import Cost, count_cost
from .etmamba import EtMamba
from .variants import VARIANTS

__all__ = ["VARIANTS", "Cost", "EtMamba", "count_cost"]
