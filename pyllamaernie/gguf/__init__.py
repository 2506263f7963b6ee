"""GGUF files: reading, checking, writing and naming. The only room that imports the `gguf` package."""
