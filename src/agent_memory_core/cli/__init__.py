"""The command `agent-memory`."""
