"""What `agent-memory demo` shows."""
