"""hfkv: a compressed, paged KV cache for HuggingFace `generate`.

    import hfkv
    model = hfkv.enable(AutoModelForCausalLM.from_pretrained(name))
    model.generate(**inputs)

Importing it registers `attn_implementation="leankv"` with transformers and changes nothing else.
"""

from hfkv.attention import register
from hfkv.cache import LeanKVCache
from hfkv.config import LeanKVConfig
from hfkv.enable import disable, enable
from hfkv.paging.pool import OutOfPages
from hfkv.report import Report
from hfkv.version import __version__

__all__ = ["LeanKVCache", "LeanKVConfig", "OutOfPages", "Report", "__version__", "disable", "enable"]

register()
