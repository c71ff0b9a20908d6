"""``python -m agent_memory_core`` is the command ``agent-memory``."""

from agent_memory_core.cli.main import main

main()
