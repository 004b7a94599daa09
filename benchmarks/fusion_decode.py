"""Tokens per second of decoding: the large model alone, with static weights, and with weights found at every step.

    python -m benchmarks.fusion_decode [--model my.gguf] [--device cuda] [--repeats 5] [--batch 1 8] [--experts 1 4]

Without `--model` the large model is a Llama of SmolLM2-135M's shape with random weights; base and experts are Llamas of
about a tenth of its size, the experts with noise on the base's weights. Speed does not depend on what weights say, but
the number of passes of the search does a little. Greedy decoding with caches, prompts of 64 tokens, no early stop; all
ways take turns in one process. `overhead` is the time above static weights, as in the paper, which reports 5.6 % for
its own models; `search` is the time of `fusion_weights` alone, as a share of a step with static weights.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import machine, markdown_table
from lit_logits.functional import fusion_weights
from lit_logits.modules import FusedCausalLM, load_causal_lm


def make_llama(vocab: int, hidden: int, layers: int, heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,  # logits that differ
    )
    return LlamaForCausalLM(config)


def make_models(path: str | None, num_experts: int, device: str) -> tuple[Any, Any, list[Any]]:
    torch.manual_seed(0)
    large: Any = make_llama(49_152, 576, 30, 9) if path is None else load_causal_lm(path)
    base: Any = make_llama(large.get_output_embeddings().weight.shape[0], 192, 4, 3)
    experts = [copy.deepcopy(base) for _ in range(num_experts)]
    with torch.no_grad():
        for expert in experts:
            for parameter in expert.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return large.to(device), base.to(device), [expert.to(device) for expert in experts]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(model: FusedCausalLM, prompts: torch.Tensor, tokens: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    model.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    synchronize(device)
    return time.perf_counter() - start


def search_seconds(model: FusedCausalLM, prompts: torch.Tensor, repeats: int, device: str) -> float:
    """Median seconds of the search at the logits that follow the prompts."""
    rows = [part(prompts).logits[:, -1] for part in (model.large, model.base, *model.experts)]  # type: ignore[misc]
    experts, times = torch.stack(rows[2:]), []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        fusion_weights(rows[0], rows[1], experts, **model.search)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    rows: list[list[object]] = []
    for num_experts in args.experts:
        large, base, experts = make_models(args.model, num_experts, args.device)
        ways = {
            "large alone": FusedCausalLM(large),
            "static, α = 1 / S": FusedCausalLM(large, base, experts, static_alpha=1 / num_experts),
            "grid": FusedCausalLM(large, base, experts, solver="grid"),
            "tilting": FusedCausalLM(large, base, experts),
            "projection": FusedCausalLM(large, base, experts, criterion="projection"),
        }
        if num_experts > 1:
            ways["tilting, joint"] = FusedCausalLM(large, base, experts, mode="joint")
        for batch in args.batch:
            prompts = torch.randint(3, 10_000, (batch, 64), device=args.device)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(args.repeats + 1):
                for name, way in ways.items():
                    took = seconds_of(way, prompts, args.tokens, args.device)
                    if turn:
                        times[name].append(took)
            medians = {name: statistics.median(values) for name, values in times.items()}
            static = medians["static, α = 1 / S"]
            for name, way in ways.items():
                searched = way.is_active and way.static_alpha is None
                search = search_seconds(way, prompts, args.repeats, args.device) if searched else 0.0
                spread = (max(times[name]) - min(times[name])) / medians[name]
                rows.append(
                    [
                        name,
                        num_experts,
                        batch,
                        f"{batch * args.tokens / medians[name]:.1f}",
                        f"{spread:.0%}",
                        f"{medians['large alone'] / medians[name]:.2f}",
                        f"{medians[name] / static - 1:+.1%}" if searched else "",
                        f"{search / (static / args.tokens):.1%}" if searched else "",
                    ]
                )
    print(f"float32; {args.tokens} tokens, {args.repeats} turns; {machine(torch.device(args.device))}\n")
    header = ["decoding", "experts", "batch", "tokens/s", "spread", "speed, of large", "overhead", "search, of a step"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
