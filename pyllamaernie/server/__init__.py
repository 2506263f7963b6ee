"""The HTTP server with its page, and the RPC worker."""
