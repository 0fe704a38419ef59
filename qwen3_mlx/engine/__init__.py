"""The engine: token ids in, token ids out, for any number of requests at once."""
