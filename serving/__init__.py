"""Measuring, reporting, gating, publishing and serving exported models.

`benchmark` times baseline and candidate; `report` is the record of a run; `gates` judges it against a policy;
`registry` publishes, promotes and rolls back releases. Of numprune, this package imports only `numprune.export` and
`numprune.errors`.
"""
