"""Methods on the logits of language models and classifiers, as PyTorch Lightning modules."""

from typing import TYPE_CHECKING

from lit_logits.lazy import lazy_names
from lit_logits.modules.vq_logits import config as _config  # noqa: F401  (registers compact models with transformers)

if TYPE_CHECKING:
    from lit_logits.causal_lm import CausalLM
    from lit_logits.dual_head_kd import DualHeadKD
    from lit_logits.dynamic_fusion import DynamicFusionDecoder
    from lit_logits.gld_fusion import GLDFusionModule
    from lit_logits.vq_logits import VQLogitsLM
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "lit_logits.causal_lm": "CausalLM",
            "lit_logits.dual_head_kd": "DualHeadKD",
            "lit_logits.dynamic_fusion": "DynamicFusionDecoder",
            "lit_logits.gld_fusion": "GLDFusionModule",
            "lit_logits.vq_logits": "VQLogitsLM",
        },
    )

# Recipes, and the hyper-parameters of checkpoints, are data: a mapping such as `backbone` stays a mapping, whatever its
# keys, and no value may name a function that runs programs or unpickles. jsonargparse itself denies those of the
# standard library. Without jsonargparse there is no command line, and the modules work all the same.
try:
    from jsonargparse import set_parsing_settings
except ModuleNotFoundError:
    pass
else:
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=[
            "cloudpickle",
            "dill",
            "joblib",
            "multiprocess",
            "torch.hub",
            "torch.load",
            "torch.package",
            "torch.utils.cpp_extension",
        ],
    )

__all__ = ["CausalLM", "DualHeadKD", "DynamicFusionDecoder", "GLDFusionModule", "VQLogitsLM"]
__version__ = "0.2.0"
