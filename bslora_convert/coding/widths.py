"""The widths that a local component may have: of its column of B and its row of A, each with what it is against.

    σ u vᵀ ≈ (s B₀ + p)(t A₀ + r)        u, p (out,); v, r (in,); s and t short: mixes of what is known (`bslora.codes.composed`)

Where nothing is known of a side its mix has no bits, and p or r is all of u or v. Where A₀ is known, t is coded finely, as it is
short, and r, what training changed, with few bits or none. B₀ is zero, so that there is no s, unless training went on from an
adapter that is known.
"""

from functools import cache
from itertools import product

from bslora_convert.bslora.codes.widths import NONE, WIDTHS

Side = tuple[int, int]  # of the mix, of the rest
Widths = tuple[Side, Side]  # of the column of B, of the row of A

FINER = 5  # bits a number that t may have beyond u: what it costs is little, what it carries is most of v
COARSEST = 2  # bits of t
OF_B, REST = (6, 8), (NONE, *(width for width in WIDTHS if width < 16))  # of s; of p and r beside a mix


@cache
def options(known_b: bool = False, known_a: bool = False) -> tuple[Widths, ...]:
    """Option 1 + k of a component has widths k of these; option 0 leaves the component out."""
    columns: list[Side] = [(NONE, u) for u in WIDTHS]
    found: list[Widths] = [(column, (NONE, v)) for column, v in product(columns, WIDTHS)]
    if known_b:
        mixed = list(product(OF_B, REST))
        columns += mixed
        found += [(column, (NONE, v)) for column, v in product(mixed, WIDTHS)]
    if known_a:
        found += [(column, row) for column in columns for row in _rows(*column)]
    return tuple(found)


def _rows(mix: int, rest: int) -> list[Side]:
    """The widths of a row against A₀ beside a column of these."""
    u = max(rest, COARSEST)
    finer = OF_B if mix else tuple(t for t in WIDTHS if u <= t <= rest + FINER)
    return list(product(finer, [NONE, *(r for r in WIDTHS if r <= rest + 1 or (mix and r < 16))]))
