"""The widths that a local component may have: of its column of B, of its row of T, of its row of A.

    σ u vᵀ ≈ û (t̂ A₀ + r̂)        u (out,), t (r₀,), v and r (in,); A₀ (r₀, in) the random initialisation of A

Without an initialisation t has no bits and r is all of v. With one, t is coded finely, as it is short, and r, what training
changed, with few bits or none.
"""

from functools import cache
from itertools import product

from bslora_convert.bslora.codes.widths import NONE, WIDTHS

Widths = tuple[int, int, int]  # of the column of B, the row of T, the row of A

ALONE: tuple[Widths, ...] = tuple((u, NONE, v) for u, v in product(WIDTHS, repeat=2))
FINER = 5  # bits a number that t may have beyond u: what it costs is little, what it carries is most of v
COARSEST = 2  # bits of t


@cache
def against_draws() -> tuple[Widths, ...]:
    """Those that use the initialisation."""
    found: list[Widths] = []
    for u in WIDTHS:
        finer = [t for t in WIDTHS if max(u, COARSEST) <= t <= u + FINER]
        found += product([u], finer, [NONE, *(r for r in WIDTHS if r <= u + 1)])
    return tuple(found)


@cache
def options(initialised: bool) -> tuple[Widths, ...]:
    """Option 1 + k of a component has widths k of these; option 0 leaves the component out."""
    return ALONE + against_draws() if initialised else ALONE
