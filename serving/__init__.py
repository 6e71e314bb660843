"""What happens to an exported model before and after it is released: measured, reported, gated, published.

`benchmark` times baseline and candidate; `report` is the record of a run; `gates` judges it against a policy;
`registry` publishes, promotes and rolls back releases. This package imports `numprune.export` and `numprune.errors`,
and nothing else of ours.
"""
