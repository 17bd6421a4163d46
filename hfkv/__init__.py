"""hfkv: a compressed, paged KV cache for HuggingFace `generate`.

    import hfkv
    model = hfkv.enable(AutoModelForCausalLM.from_pretrained(name))
    model.generate(**inputs)

Importing it registers `attn_implementation="leankv"` with transformers and changes nothing else.
"""

from hfkv.version import __version__, check_transformers

check_transformers()

from hfkv.attention import register  # noqa: E402  (an old transformers lacks what the rest imports)
from hfkv.cache import LeanKVCache  # noqa: E402
from hfkv.config import LeanKVConfig  # noqa: E402
from hfkv.enable import disable, enable  # noqa: E402
from hfkv.graphs import DecodeReport, compile_decode, decode_report  # noqa: E402
from hfkv.packing import Packed  # noqa: E402
from hfkv.paging.pool import OutOfPages  # noqa: E402
from hfkv.reconstruct import reconstruct  # noqa: E402
from hfkv.report import Report  # noqa: E402

__all__ = [
    "DecodeReport",
    "LeanKVCache",
    "LeanKVConfig",
    "OutOfPages",
    "Packed",
    "Report",
    "__version__",
    "compile_decode",
    "decode_report",
    "disable",
    "enable",
    "reconstruct",
]

register()
