"""Laws first (`laws.py`), then what each part promises."""
