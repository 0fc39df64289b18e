"""Which module computes a function at its call site, and how it is called."""
