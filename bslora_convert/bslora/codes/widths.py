"""How many bits a coded number may take."""

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)  # 16: as it is, in bfloat16
NONE = 0  # a vector of zeros that takes no bits: only beside the random initialisation
UNSCALED = (NONE, 16)  # vectors without scales
