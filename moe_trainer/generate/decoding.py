"""Token after token from a model that may be split over ranks."""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moe_trainer.models.attention import KVCache
from moe_trainer.models.decoder import CausalLM
from moe_trainer.parallel.collectives import gather_replicated

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Logits [batch, vocab] -> token ids [batch] on the same device, without a look at them from the host."""

_EAGER_STEPS = 2  # before a capture: kernels are chosen and loaded, and one step shows whether it can be captured


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]] | torch.Tensor,
    max_new_tokens: int,
    sampler: Choose | None = None,
    stop_ids: Collection[int] = (),
    group: ProcessGroup | None = None,
    cuda_graph: bool = True,
) -> Iterator[torch.Tensor]:
    """Continue prompts of any lengths: one pass over them, then one over each new token. Collective over `group`.

    Shorter prompts are padded on the left, and the padding is masked: each sequence comes out as it would alone.

    Args:
        prompts: token ids of each, the same on every rank; none empty.
        max_new_tokens: the longest prompt and this must fit the positions that the model is made for.
        sampler: chooses from whole logits, and the choice of the group's first rank goes to all; None: greedy.
        stop_ids: tokens that end a sequence.
        group: ranks that split the logits; None where every rank has all of them.
        cuda_graph: on a GPU, record the step over one token and replay it, where it can be recorded.

    Yields:
        Token ids [batch], on the CPU; the stop token is the last of its sequence, and repeated until all have ended.
        On a GPU the next step is under way by then: when the last sequence ends, it was for nothing.
    """
    device = model.model.embed_tokens.weight.device
    input_ids, starts = pad_left(prompts, device)
    cache = KVCache(len(model.model.layers), input_ids.shape[1] + max_new_tokens, starts)
    choose = _chooser(sampler, group)
    first = choose(model(input_ids, cache).logits[:, -1])
    step = DecodeStep(model, cache, choose, first, cuda_graph and device.type == "cuda")
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64)
    shown: torch.Tensor | None = None
    for tokens in _read_behind(step, max_new_tokens):
        shown = tokens if shown is None else torch.where(ended, shown, tokens)
        ended |= torch.isin(shown, stops)
        yield shown
        if ended.all():
            return


def pad_left(
    prompts: Sequence[Sequence[int]] | torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids [batch, longest], and the column where each prompt begins [batch]; None if all are equally long."""
    longest = max(len(prompt) for prompt in prompts)
    assert min(len(prompt) for prompt in prompts) > 0, "a prompt without tokens"
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)  # any id will do: nobody looks at padding
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[longest - len(prompt) :] = torch.as_tensor(prompt)
    starts = torch.tensor([longest - len(prompt) for prompt in prompts])
    return input_ids.to(device), starts.to(device) if starts.any() else None


class DecodeStep:
    """One more token for each sequence, in place: what was chosen is the next step's input.

    Captured, the step is a CUDA graph, collectives included: one launch instead of some hundreds. The first steps run
    as usual, and the graph replaces them only if they do not wait for the host (experts one after the other, where
    the grouped GEMM does not take the type, read their row counts there).
    """

    def __init__(
        self, model: CausalLM, cache: KVCache, choose: Choose, tokens: torch.Tensor, captures: bool = False
    ) -> None:
        """`tokens`: [batch] the tokens that follow what the cache holds; each step puts the next ones there."""
        self.tokens = tokens.clone()
        self.replay: Callable[[], None] | None = None
        """Set once the step is captured."""
        self._model, self._cache, self._choose = model, cache, choose
        self._captures = captures
        self._eager_steps = 0

    def __call__(self) -> None:
        if self._captures and self._eager_steps == _EAGER_STEPS:
            self.replay = self.replay or _record(self._run)
            self.replay()
            return
        self._eager_steps += 1
        if self._captures and self._eager_steps == _EAGER_STEPS:
            self._captures = not _waits_for_host(self._run)
        else:
            self._run()

    def _run(self) -> None:
        logits = self._model(self.tokens.unsqueeze(1), self._cache).logits[:, -1]
        self.tokens.copy_(self._choose(logits))


def _record(run: Callable[[], None]) -> Callable[[], None]:
    """What does on the GPU, at each call, the work that `run` would give it; `run` is recorded here, not done."""
    graph = torch.cuda.CUDAGraph()
    # Another thread, NCCL's watchdog, may query events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _waits_for_host(run: Callable[[], None]) -> bool:
    """Whether `run`, which is done once, makes the host wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _read_behind(step: DecodeStep, count: int) -> Iterator[torch.Tensor]:
    """The tokens that `step` holds and those of `count - 1` calls of it, [batch] each, on the CPU.

    On a GPU they travel while the next step runs: it is launched before the host waits for them.
    """
    if step.tokens.device.type != "cuda":
        yield step.tokens.clone()
        for _ in range(count - 1):
            step()
            yield step.tokens.clone()
        return
    rows = torch.empty(count, len(step.tokens), dtype=torch.int64, pin_memory=True)
    arrived = torch.cuda.Event()
    try:
        for number, row in enumerate(rows):
            row.copy_(step.tokens, non_blocking=True)
            arrived.record()
            if number + 1 < count:
                step()
            arrived.synchronize()
            yield row
    finally:
        torch.cuda.current_stream().synchronize()  # the last step may still run in memory that is given back now


def _chooser(sampler: Choose | None, group: ProcessGroup | None) -> Choose:
    """From this rank's logits [batch, vocab / ranks] to token ids [batch], the same on every rank."""
    if group is None:
        return sampler or (lambda logits: logits.argmax(-1))
    if sampler is None:
        return lambda logits: _greedy(logits, group)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        tokens = sampler(gather_replicated(logits, 1, [logits.shape[1]] * group.size(), group))
        # Sums of many probabilities may differ in the last bits, and so may a choice at an edge.
        dist.broadcast(tokens, group=group, group_src=0)
        return tokens

    return sample


def _greedy(logits: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Only the best of each rank travels: value and global id, both exact in float64."""
    value, index = logits.max(-1)
    index = index + group.rank() * logits.shape[1]
    best = torch.stack((value.double(), index.double()), dim=-1).unsqueeze(0)  # [1, batch, 2]
    values, indices = gather_replicated(best, 0, [1] * group.size(), group).unbind(-1)  # [ranks, batch]
    return indices.gather(0, values.argmax(0, keepdim=True)).squeeze(0).long()
