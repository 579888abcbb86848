"""Documents in, batches of packed tokens out."""
