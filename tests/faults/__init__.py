"""``make fault-check``: what is done to runs on purpose, and what it costs them."""
