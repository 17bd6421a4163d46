"""`python -m hfkv eval`: accuracy against physical bytes, tasks by methods, on the user's own model."""
