"""Kernels for products and codecs of 1 to 8 bits: plain arrays in and out, one file an operation; see README.md."""
