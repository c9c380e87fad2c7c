"""How we know: held-out loss and exact-match skills, always with an interval."""
