"""What concerns the process as a whole: interrupts, what other libraries say, how long work tells where it is."""
