"""Codes that move: changes of codebook and mapping in training and revival that no gradient makes.

Letters: V vocabulary, d hidden size, K codes.
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from lit_logits.contracts import Reassigned, Revival
from lit_logits.functional.checks import check_finite, check_token_to_code
from lit_logits.functional.code_assignment import code_means, reassign_tokens, split_heavy_codes
from lit_logits.functional.code_reassignment import Positions, vq_token_statistics
from lit_logits.functional.codebook import code_usage, dead_codes
from lit_logits.functional.distributed import broadcast_
from lit_logits.functional.kmeans import nearest_centroids
from lit_logits.modules.vq_logits.counting import CountsTokens
from lit_logits.modules.vq_logits.reassigning import move_codes, set_aside
from lit_logits.modules.vq_logits.tables import TableCache

__all__ = ["CodebookUpdate", "MappingStrategy", "MovingCodes"]

MappingStrategy = Literal["fixed", "learned", "reassigned"]
CodebookUpdate = Literal["gradient", "ema"]


class MovingCodes(CountsTokens):
    """The half of `VQLogitsHead` that changes its codes; the arguments and tensors are that head's."""

    vocab_size: int
    codebook_size: int
    mapping: MappingStrategy
    codebook_update: CodebookUpdate
    decay: float
    reassign_every_n_steps: int
    codebook: nn.Parameter
    token_bias: nn.Parameter | None
    latents: nn.Parameter | None
    logit_cap: float | None
    token_to_code: Tensor
    num_updates: Tensor
    ema_sums: Tensor
    ema_mass: Tensor
    _token_table: tuple[nn.Embedding, ...]
    _tables: TableCache

    # ------------------------------------------------------------------ changing the codes

    def bind_token_table(self, table: nn.Embedding) -> None:
        """Set the (V, ·) embedding that tells which tokens are alike; it stays its owner's, also in checkpoints."""
        if table.weight.shape[0] < self.vocab_size:
            raise ValueError(
                f"Expected `table` to have at least {self.vocab_size} rows, one a token, but got"
                f" {tuple(table.weight.shape)}."
            )
        self._token_table = (table,)

    def token_vectors(self) -> Tensor | None:
        """Return vectors (V, ·) that tell which tokens are alike: latents, else the bound table, else None."""
        if self.latents is not None:
            return self.latents.detach()
        if self._token_table:
            return self._token_table[0].weight.detach()[: self.vocab_size]
        return None

    @torch.no_grad()
    def set_codes(
        self,
        codebook: Tensor | None = None,
        token_to_code: Tensor | None = None,
        *,
        token_bias: Tensor | None = None,
        token_counts: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> None:
        """Replace codes, on every rank by those of rank 0; None leaves a tensor as it is.

        Args:
            codebook: (K, d).
            token_to_code: (V,) int64 in [0, K).
            token_bias: (V,) in nats.
            token_counts: (V,) counts to start the running counts from.
            latents: (V, d) to start the latents from; without them they restart around their codes.

        Raises:
            ValueError: If a shape differs, a code is out of range or a value is not finite; nothing is written then.
        """
        if token_to_code is not None:
            check_token_to_code(token_to_code, self.vocab_size, self.codebook_size)
        given = {
            "codebook": codebook,
            "token_to_code": token_to_code,
            "token_bias": token_bias,
            "token_counts": token_counts,
            "latents": latents,
        }
        pairs = [(name, getattr(self, name), value) for name, value in given.items() if value is not None]
        pairs = [(name, target, value) for name, target, value in pairs if target is not None]
        for name, target, value in pairs:  # all checks before the first write
            if value.shape != target.shape:
                raise ValueError(
                    f"Expected `{name}` to have shape {tuple(target.shape)}, but got {tuple(value.shape)}."
                )
            if value.is_floating_point():
                check_finite(value, name)
        for _, target, value in pairs:
            target.copy_(value)
        if latents is None:
            self._restart_latents()
        self._restart_ema()
        # DDP broadcasts parameters once, when it wraps the model, and that is before the head starts. Each rank has
        # fitted its own codes, which may differ by seed or by rounding.
        broadcast_(*(tensor for tensor in self.state_dict().values()))

    @torch.no_grad()
    def after_step(self) -> None:
        """Move what gradients do not: the EMA codebook, and the mapping every `reassign_every_n_steps`."""
        self._tables.clear()
        self.num_updates += 1
        if self.codebook_update == "ema":
            self._update_ema()
        if self.mapping != "fixed" and int(self.num_updates) % self.reassign_every_n_steps == 0:
            self._reassign()

    def usage(self) -> Tensor:
        """Return the running share (K,) of the targets that each code carries; zeros before any training."""
        return code_usage(self.token_counts, self.token_to_code, self.codebook_size)

    def dead_codes(self, min_usage: float = 0.0) -> Tensor:
        """Return codes (D,) that own no token, or carry less than `min_usage` times an even share of the targets."""
        return dead_codes(self.token_counts, self.token_to_code, self.codebook_size, min_usage)

    def revive_dead(self, min_usage: float = 0.0, *, generator: torch.Generator | None = None) -> Revival:
        """Revive all dead codes; see `dead_codes`, `revive` and `RevivableHead`."""
        is_dead = torch.zeros(self.codebook_size, dtype=torch.uint8, device=self.codebook.device)
        is_dead[self.dead_codes(min_usage)] = 1
        broadcast_(is_dead)  # ranks whose running counts round differently must still revive the same codes
        dead = is_dead.nonzero().squeeze(1)
        if dead.numel() == 0:
            return Revival(0, {})
        changed = self.revive(dead, generator=generator)
        num_revived = dead.numel() - int(torch.isin(dead, self.dead_codes()).sum())
        return Revival(num_revived, {self.codebook: changed})

    @torch.no_grad()
    def revive(self, dead: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Give each dead code one half of a heavy code, and reset the running state of the codes that change.

        A revived code starts as a copy of the code that it was split from, so the logits of that code's tokens do not
        change. With latents both halves move to the mean of their latents instead; otherwise the next assignment would
        give the tokens back. All ranks end with the codes of rank 0. The caller resets the moments of the optimizer.

        Args:
            dead: (D,) int64 codes.
            generator: source of randomness, on the device of the head.

        Returns:
            int64 codes whose vectors changed, in rising order: the revived ones and, with latents, those that they were
            split from.
        """
        split = split_heavy_codes(
            self.token_to_code,
            self.codebook_size,
            dead,
            token_counts=self.token_counts,
            vectors=self.token_vectors(),
            generator=generator,
        )
        revived, sources = dead[split.sources >= 0], split.sources[split.sources >= 0]
        changed = revived if self.latents is None else torch.cat([revived, sources]).unique()
        self.token_to_code.copy_(split.token_to_code)
        if self.latents is None:
            for code, source in zip(revived, sources, strict=True):  # in order: a source may itself be revived
                self.codebook[code] = self.codebook[source]
        else:
            means, _ = code_means(self.latents, self.token_to_code, self.codebook_size)
            self.codebook[changed] = means[changed].to(self.codebook.dtype)
        # As a mask, because `changed` may have another length on another rank, and a broadcast needs one shape.
        is_changed = torch.zeros(self.codebook_size, dtype=torch.uint8, device=self.codebook.device)
        is_changed[changed] = 1
        broadcast_(self.codebook, self.token_to_code, is_changed)
        changed = is_changed.nonzero().squeeze(1)
        self._restart_ema(changed)
        return changed

    @property
    def can_reassign(self) -> bool:
        """Whether the mapping is fixed: one that is learned or reassigned by vectors would undo it."""
        return self.mapping == "fixed" and self.latents is None

    @torch.no_grad()
    def reassign(self, positions: Positions, *, min_gain: float = 2.0, slack: float = 0.0) -> Reassigned:
        """Give tokens the codes that lower the loss most, on all ranks those of rank 0; see `move_codes`."""
        held: list[tuple[Tensor, Tensor]] = []
        others, cap = set_aside(positions, held), self.logit_cap
        sums = vq_token_statistics(others, self.codebook, self.token_to_code, self.token_bias, cap=cap)
        before = self.token_to_code.clone().unsqueeze(1)

        def write(token_codes: Tensor) -> None:
            self.token_to_code.copy_(token_codes.squeeze(1))
            self._tables.clear()

        changed = move_codes(self, sums, [self.codebook], before, held, write=write, min_gain=min_gain, slack=slack)
        broadcast_(*self.state_dict().values())
        self._tables.clear()
        return changed

    # ------------------------------------------------------------------ inside

    @torch.no_grad()
    def _restart_latents(self) -> None:
        if self.latents is not None:
            # Near their codes, so that the mapping holds; apart, so that tokens of one code can go different ways.
            noise = torch.randn_like(self.latents) * 0.1 * self.codebook.std(correction=0)
            self.latents.copy_(self.codebook[self.token_to_code] + noise)
        self._restart_ema()

    def _restart_ema(self, codes: Tensor | None = None) -> None:
        """Restart the running sums of `codes` (default all) from the codes as they are."""
        if self.codebook_update != "ema":
            return
        sizes = torch.bincount(self.token_to_code, minlength=self.codebook_size).to(self.ema_mass)
        rows = slice(None) if codes is None else codes
        self.ema_mass[rows] = sizes[rows]
        self.ema_sums[rows] = self.codebook[rows].detach().to(self.ema_sums) * sizes[rows].unsqueeze(1)

    def _update_ema(self) -> None:
        # Sums and masses decay alike, so each code is a mean of its tokens' latents over past steps, in which recent
        # ones weigh more. A code without tokens keeps its vector: its sum and mass both tend to 0.
        latents = cast(Tensor, self.latents)
        means, mass = code_means(latents.to(self.ema_sums), self.token_to_code, self.codebook_size)
        self.ema_mass.lerp_(mass, 1 - self.decay)
        self.ema_sums.lerp_(means * mass.unsqueeze(1), 1 - self.decay)
        alive = mass > 0
        self.codebook[alive] = (self.ema_sums[alive] / self.ema_mass[alive].unsqueeze(1)).to(self.codebook.dtype)
        broadcast_(self.codebook)  # DDP carries buffers and gradients, and a parameter without a gradient is neither

    def _reassign(self) -> None:
        vectors = self.token_vectors()
        if self.mapping == "learned":
            self.token_to_code.copy_(nearest_centroids(cast(Tensor, vectors), self.codebook))
        elif vectors is None:
            raise ValueError(
                "Expected a token table for mapping='reassigned': call `bind_token_table(embedding)` with the input"
                " embedding."
            )
        else:
            self.token_to_code.copy_(reassign_tokens(vectors, self.token_to_code, self.codebook_size))
        broadcast_(self.token_to_code)  # distances that nearly tie may round to another code on another rank
