"""What a fit, an allocation and a code measure by."""
