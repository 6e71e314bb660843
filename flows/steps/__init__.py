"""The bodies of the stages, a few calls each into the other packages. They import the tensor libraries; nothing else in
`flows` does, which keeps the command line fast.
"""
