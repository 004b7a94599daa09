"""lm-evaluation-harness on fused decoders: its command line, with one more kind of model.

    python -m lit_logits.harness --model lit_logits --tasks gsm8k --batch_size 4 --model_args \
        "pretrained=models/large,base=models/base,experts=models/python;models/arithmetic,routing=text"

`--model_args` are arguments of `DynamicFusionDecoder`; `experts` are separated by semicolons. It needs `lm_eval`.
"""

from inspect import signature
from typing import Any

from lit_logits.dynamic_fusion import DynamicFusionDecoder

__all__ = ["main", "register"]

_OWN = {"self", "model", "base", "experts", "model_kwargs", "small_kwargs"}
_DECODER = signature(DynamicFusionDecoder.__init__).parameters.keys() - _OWN


def register() -> type:
    """Add the kind of model `lit_logits` to lm-evaluation-harness, and return its class, a `HFLM`.

    Raises:
        ValueError: If lm_eval is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(
            "Expected lm_eval, whose command line this is, but it cannot be imported. Run `pip install lm_eval`."
        ) from error

    class FusedHFLM(HFLM):
        """A fused decoder; the arguments are those of `DynamicFusionDecoder` and of `HFLM`."""

        def __init__(
            self,
            pretrained: Any,
            base: Any = None,
            experts: Any = (),
            *,
            dtype: str = "auto",
            max_length: int | None = None,
            **kwargs: Any,
        ) -> None:
            given = {name: kwargs.pop(name) for name in _DECODER if name in kwargs}
            experts = [part for part in experts.split(";") if part] if isinstance(experts, str) else experts
            loading = {"dtype": dtype}
            decoder = DynamicFusionDecoder(
                pretrained, base, experts, model_kwargs=loading, small_kwargs=loading, **given
            ).eval()
            if decoder.tokenizer is None:
                raise ValueError(
                    "Expected a tokenizer beside the models, or as `tokenizer`, to read the tasks with, but got none."
                )
            decoder.to(kwargs.get("device") or "cpu")
            model = decoder.as_model()
            super().__init__(model, tokenizer=decoder.tokenizer, max_length=max_length or model.context, **kwargs)

    return register_model("lit_logits")(FusedHFLM)


def main() -> None:
    """Run the command line of lm-evaluation-harness."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
