"""What the stages do, a few calls each into the other packages. `bodies` has the function of each stage.

The other modules import the tensor libraries; nothing else in `flows` does, which keeps the command line fast.
"""
