"""A checkpoint from the published files of LlamaGen, which are no Hugging Face checkpoints."""

import json
from pathlib import Path

from numprune.export import checkpoint, files, temporary
from numprune.export.config import set_dtype
from numprune.export.headers import read_headers
from numprune.export.shards import writing
from numprune.export.state_dict import read_state_dict
from numprune.llamagen.config import LlamaGenConfig
from numprune.llamagen.convert import config_of, converted


def convert(source: Path, out: Path, *, codes_per_image: int, heads: int | None = None) -> LlamaGenConfig:
    """Write a published state dict as a checkpoint of `LlamaGenForCausalLM` to the new folder `out`.

    Args:
        source: a .pt or .safetensors file. Of the former only tensors are read, no code is run.
        codes_per_image, heads: as for `config_of`.

    Raises:
        InputError: the file cannot be read, or is not of a class-conditional LlamaGen.
        IntegrityError: a value is not finite.
    """
    state = read_state_dict(source)
    config = config_of(state, codes_per_image, heads)
    with temporary.beside(out) as folder:
        without_values = {name: tensor.to("meta") for name, tensor in state.items()}
        dtypes = {name: tensor.dtype for name, tensor in converted(without_values, config)}
        with writing(folder, dtypes) as writer:
            for name, tensor in converted(state, config):
                writer.add({name: tensor})
        set_dtype(config, read_headers(folder))
        files.write_object(folder / files.CONFIG, json.loads(config.to_json_string()))
        checkpoint.audit(folder)
        temporary.move(folder, out)
    return config
