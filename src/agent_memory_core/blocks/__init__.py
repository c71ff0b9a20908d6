"""Blocks of tokens as pure data: their names, what memory holds, how much of a prompt is stored, where to resume."""
