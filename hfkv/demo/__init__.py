"""The demo: a real small model on real text, the exact cache beside LeanKV. `import hfkv` never imports this."""
