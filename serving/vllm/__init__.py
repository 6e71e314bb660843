"""vLLM servers, each a process of vLLM's own environment: found, started, watched and stopped.

`environment` finds the interpreter that has vLLM; `server` starts a server for a checkpoint; `process` is what servers
and the router have in common as processes. Nothing here imports vLLM or a tensor library.
"""
