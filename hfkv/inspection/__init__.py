"""`python -m hfkv inspect`: one self-contained HTML page of what a cache keeps of a prompt.

    from hfkv.inspection import examine, write_page
    write_page(examine(model, tokenizer, ids, LeanKVConfig.preset("aggressive"), generate=64), "inspect.html")

`import hfkv` never imports this.
"""

from hfkv.inspection.examine import Examination, Moment, examine
from hfkv.inspection.page import make_page, write_page

__all__ = ["Examination", "Moment", "examine", "make_page", "write_page"]
