"""`python -m hfkv bench`: times and bytes of the cache on one device, into one CSV, with tables, plots and goals."""
