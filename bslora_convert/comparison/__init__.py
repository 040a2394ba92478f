"""Every known form of an adapter at one size, side by side."""
