"""HTTP server: the protocols of OpenAI, Anthropic and Ollama over one engine."""
