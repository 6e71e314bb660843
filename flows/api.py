"""numprune from Python: what `import numprune` gives.

    import numprune

    model = numprune.load("my-model")
    rows = numprune.calibration_rows("train.jsonl", model)
    plan = numprune.plan(model, rows, ratio=0.3)
    pruned = numprune.apply(plan, model, rows)
    pruned.save("pruned")
    print(numprune.compare(pruned, model, "heldout.jsonl").nll_delta_nats_per_token)
    numprune.export_checkpoint("pruned", "pruned-onnx", to="onnx")

No function changes the model that it is given. The command line does the same from folder to folder, and streams models
that are larger than the memory; the whole chain with benchmark, gates and registry is `numprune optimize`.
"""
