"""The one loop over scales, and what times it."""
