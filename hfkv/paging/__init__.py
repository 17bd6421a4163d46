"""Where packed tokens live: the page pool, page tables, and the compaction that moves tokens between tiers."""

from hfkv.paging.pool import OutOfPages, PagePool

__all__ = ["OutOfPages", "PagePool"]
