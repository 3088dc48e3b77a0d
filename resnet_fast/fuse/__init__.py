"""``accelerate()``: fuse the convolutions of a network that exists already, and say what was done.

``capture`` copies the module tree and traces it, ``match`` finds the sites by dataflow, ``program``
is the rewritten graph and its executor, ``verify`` compares site by site, ``rewrite`` puts them
together, ``explain`` reports. For 8 bits ``calibrate`` looks at the activations, ``grids`` decides
what is bytes, and ``int8`` runs a program on them.
"""

from resnet_fast.fuse.explain import Explanation, explain
from resnet_fast.fuse.match import REASONS
from resnet_fast.fuse.rewrite import Accelerated, accelerate, undo

__all__ = ["REASONS", "Accelerated", "Explanation", "accelerate", "explain", "undo"]
