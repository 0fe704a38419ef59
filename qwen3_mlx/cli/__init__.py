"""The `qwen3` command: one module per subcommand."""
