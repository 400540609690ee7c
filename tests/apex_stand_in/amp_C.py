"""Compiled in apex; here only found."""
