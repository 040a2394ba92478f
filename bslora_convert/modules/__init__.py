"""An adapter's modules: their names and the order of these, a matrix held as two thin factors, its truncated SVD."""
