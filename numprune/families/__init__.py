"""The supported architectures, one file each. docs/adding-an-architecture.md explains how to add one."""

from numprune.families.bert import BERT
from numprune.families.deit import DEIT
from numprune.families.dinov2 import DINOV2
from numprune.families.distilbert import DISTILBERT
from numprune.families.electra import ELECTRA
from numprune.families.family import Family, Kind, Matrix, Wiring
from numprune.families.gemma import GEMMA
from numprune.families.gemma2 import GEMMA2
from numprune.families.gemma3 import GEMMA3
from numprune.families.gpt2 import GPT2
from numprune.families.gpt_neox import GPT_NEOX
from numprune.families.gpt_oss import GPT_OSS
from numprune.families.granite import GRANITE
from numprune.families.imagegpt import IMAGEGPT
from numprune.families.llama import LLAMA
from numprune.families.llamagen import LLAMAGEN
from numprune.families.mistral import MISTRAL
from numprune.families.mixtral import MIXTRAL
from numprune.families.olmo2 import OLMO2
from numprune.families.opt import OPT
from numprune.families.phi3 import PHI3
from numprune.families.qwen2 import QWEN2
from numprune.families.qwen2_moe import QWEN2_MOE
from numprune.families.qwen3 import QWEN3
from numprune.families.qwen3_moe import QWEN3_MOE
from numprune.families.roberta import ROBERTA
from numprune.families.smollm3 import SMOLLM3
from numprune.families.stablelm import STABLELM
from numprune.families.starcoder2 import STARCODER2
from numprune.families.swin import SWIN
from numprune.families.vit import VIT

_ALL = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    STARCODER2,
    GRANITE,
    SMOLLM3,
    PHI3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    OLMO2,
    GPT2,
    OPT,
    GPT_NEOX,
    STABLELM,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GPT_OSS,
    IMAGEGPT,
    LLAMAGEN,
    BERT,
    ROBERTA,
    DISTILBERT,
    ELECTRA,
    VIT,
    DEIT,
    DINOV2,
    SWIN,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

__all__ = ["FAMILIES", "Family", "Kind", "Matrix", "Wiring"]
