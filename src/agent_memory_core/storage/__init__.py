"""Files and SQLite: blocks that outlive the process, and the index of them. Nothing here knows MLX."""
