"""The bodies of a run's stages, each a function of artifacts and plain values to a folder and a result.

A run's main process only refers to these functions; a child process runs them and imports the tensor libraries.
"""
