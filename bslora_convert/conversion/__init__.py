"""One adapter on its way from factors to a directory: fitted, coded, written, read back, measured."""
