"""Models by name: what a user names, which files of a repository that means, and having them on this machine.

The cache, tokens, mirrors and requests are huggingface_hub's (extra `hub`), which is imported only when it is needed.
"""
