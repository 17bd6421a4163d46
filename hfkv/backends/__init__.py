"""What a layer asks of its kernels, in two forms with one meaning: plain torch (`plain`) and Triton (`fused`)."""

from hfkv.backends.select import choose, kernels_for

__all__ = ["choose", "kernels_for"]
