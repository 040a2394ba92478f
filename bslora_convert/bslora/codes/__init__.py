"""Numbers in 1 to 8 bits: the trellis, codes of matrices, and codes in bytes."""
