"""The Python API: loading, conversion, generation, conversations."""
