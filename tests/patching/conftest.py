from patch_checkout import root, upstream  # noqa: F401  - fixtures
