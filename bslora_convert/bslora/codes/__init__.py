"""Numbers in 1 to 8 bits: the trellis, the first version's levels, codes of matrices, and codes in bytes."""
