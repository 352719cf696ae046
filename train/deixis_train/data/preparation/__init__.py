"""From samples to examples (sections 2 and 14). `geometry` and `alignment` are torch-free."""
