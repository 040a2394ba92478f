"""Experts of a mixture, one module each, that readers stack into one tensor.

transformers 5 holds the experts of a layer in one parameter, and PEFT puts an adapter on it by stacking theirs: every expert of
every layer, and the router beside them, has the configuration's own `r`.
"""

import re
from collections.abc import Collection

EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
ROUTER = re.compile(r"(^|\.)(block_sparse_moe|mlp|feed_forward)\.(gate|router)$")


def beside(names: Collection[str]) -> list[str]:
    """Modules that are called as experts are, and are none: shared experts, dense layers. PEFT leaves these without an adapter.

    It takes an expert's name for all modules of that name, and puts the adapter on the stacked parameter alone (PEFT 0.21.2 under
    transformers 5).
    """
    experts = {name for name in names if EXPERT.search(name)}
    called = {name.rpartition(".")[2] for name in experts}
    return sorted(name for name in names if name not in experts and name.rpartition(".")[2] in called)


def stacked(names: Collection[str]) -> frozenset[str]:
    """The modules whose ranks have to be equal; none where there are no experts."""
    experts = {name for name in names if EXPERT.search(name)}
    return frozenset(experts | {name for name in names if experts and ROUTER.search(name)})
