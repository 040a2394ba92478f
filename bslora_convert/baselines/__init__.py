"""The other forms that an adapter can take, each a least-squares fit: what BSLoRA is compared with."""
