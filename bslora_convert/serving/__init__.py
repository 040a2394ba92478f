"""What serving engines ask of an adapter, and the formats other than PEFT's that they read."""
