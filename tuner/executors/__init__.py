"""Where micro-batches are evaluated."""
