"""What a run says about itself: metrics while it runs (metrics.py), one page about it (html.py)."""
