"""Error rates of the gates: simulated data with known truth, judged like reports."""
