"""How anything is found, read, hashed and lands: addresses, tensor files, results, what travels beside an adapter."""
