"""The pure books: blocks, chains, what memory holds, and what of it a prompt begins with."""
