"""An adapter's modules: their names and the order of these, and a matrix held as two thin factors."""
