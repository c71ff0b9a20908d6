"""Everything that makes the tiny chat model: its conversations, its tokenizer, its training and its evaluation."""
