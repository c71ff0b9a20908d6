"""Keys and values: out of a live cache, encoded, and back. The only package that knows mlx-lm's cache classes."""
