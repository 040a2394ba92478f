"""Many adapters: found, planned, converted on engines that can fail, and summed up."""
