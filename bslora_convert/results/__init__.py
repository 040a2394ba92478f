"""What the verbs return, and write as JSON. Sizes in bytes, times in seconds, KL in nats a token, shares from 0 to 1."""
