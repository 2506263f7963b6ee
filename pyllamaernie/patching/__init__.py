"""The patch manager: the pinned upstream, our series on it, and the tree that is built. Standard library only."""
