"""The Triton kernels, one file per twin of `hfkv.kernels`, with the twin's name; imported only where they run."""
