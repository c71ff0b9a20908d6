"""Tokenizers and chat templates: from messages to token ids, and from token ids to text."""
