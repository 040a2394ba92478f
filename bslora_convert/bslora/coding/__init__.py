"""Numbers in 1 to 8 bits: levels, codes of matrices, and codes in bytes."""
