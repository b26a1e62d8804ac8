"""In the engine's core: a chunk of a team's prompt ends where a vector is missing or the adapter changes, and blocks are not
named by stand-ins."""

import math

from diffmas.serving.vllm.course import Course
from diffmas.serving.vllm.limits import teams_of

__all__ = ["block_keys", "cached", "chunk"]


def _course(request) -> Course | None:
    params = request.sampling_params
    return None if params is None else Course.read(params.extra_args)


def chunk(original):
    """Around `Scheduler._reserve_prefill_lookahead`, the last word on how many tokens of a request a step computes."""

    def shortened(self, request, num_computed_tokens, num_new_tokens):
        tokens, course = original(self, request, num_computed_tokens, num_new_tokens), _course(request)
        if course is None or num_computed_tokens >= course.end:
            return tokens
        adapters = teams_of(self.vllm_config)[course.team]["loras"]
        return course.chunk_end(num_computed_tokens, num_computed_tokens + tokens, adapters) - num_computed_tokens

    return shortened


def cached(original):
    """Around `KVCacheManager.get_computed_blocks`: a hit that ends before a latent step lacks the hidden state of its vector,
    and is shortened to where none begins."""

    def shortened(self, request):
        blocks, tokens, boundary = original(self, request)
        course, fits = _course(request), tokens
        if course is None or not course.is_latent(tokens):
            return blocks, tokens, boundary
        step = math.lcm(*(manager.block_size for manager in self.coordinator.single_type_managers))
        while fits and course.is_latent(fits):
            fits = (fits - 1) // step * step
        return self.truncate_computed_blocks(blocks, fits), fits, 0

    return shortened


def block_keys(original):
    """Around `generate_block_hash_extra_keys`, which says what a block's hash is of beside its tokens and the block before."""

    def named(request, start_token_idx, end_token_idx, start_mm_idx):
        keys, next_mm = original(request, start_token_idx, end_token_idx, start_mm_idx)
        course = _course(request)
        if course is None:
            return keys, next_mm
        return (*(keys or ()), ("diffmas", course.key(start_token_idx, end_token_idx))), next_mm

    return named
