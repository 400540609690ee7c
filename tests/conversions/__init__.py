"""``make matrix``: the tests that prove a conversion, run under both transformers, as a page."""
