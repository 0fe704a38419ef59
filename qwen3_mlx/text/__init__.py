"""Text processing: tokenizer, chat template, reply parser, tool calls and decoding constraints."""
