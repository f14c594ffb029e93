"""The compiled kernels: building, caching and loading them."""
