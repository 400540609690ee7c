"""Only what is imported from here."""
