"""What runs one model: requests become turns, turns become tokens, and what they computed is kept."""
