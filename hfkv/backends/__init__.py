"""What a layer asks of its kernels, in forms of one meaning: torch (`plain`, `compiled`) and Triton (`fused`)."""

from hfkv.backends.select import choose, kernels_for

__all__ = ["choose", "kernels_for"]
