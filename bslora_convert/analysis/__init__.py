"""Is there anything to share? Measures of redundancy within and across layers, each beside what chance would give."""
