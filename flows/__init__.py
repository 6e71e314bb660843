"""The whole chain as one Prefect flow, its recipe, and the command line.

`recipe` says what is wanted and refuses what cannot work; `stages` makes each step's folder once and only once;
`children` gives a step a process of its own; `work` holds the steps' bodies, a few calls each into the other packages;
`optimize` strings them together as a flow; `cli` is the command line. Nothing else of ours imports this package.
"""
