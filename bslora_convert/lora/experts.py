"""Experts of a mixture, one module each, that readers stack into one tensor.

transformers 5 holds the experts of a layer in one parameter, and PEFT puts an adapter on it by stacking theirs: every expert of
every layer, and the router beside them, has the configuration's own `r`.
"""

import re
from collections.abc import Collection

EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
ROUTER = re.compile(r"(^|\.)(block_sparse_moe|mlp|feed_forward)\.(gate|router)$")


def stacked(names: Collection[str]) -> frozenset[str]:
    """The modules whose ranks have to be equal; none where there are no experts."""
    experts = {name for name in names if EXPERT.search(name)}
    return frozenset(experts | {name for name in names if experts and ROUTER.search(name)})
