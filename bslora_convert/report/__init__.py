"""Pages, plots and cards of what the verbs found, and the words that a reader sees of it."""
