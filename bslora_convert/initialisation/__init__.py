"""A's random initialisation: the numbers that PEFT drew it from, and where in an adapter they are found again."""
