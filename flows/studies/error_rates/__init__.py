"""How often the gates are wrong: worlds whose truth is known, judged as reports are."""
