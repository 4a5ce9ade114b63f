"""Faster sampling on a GPU: decoding with a static cache, replayed as one CUDA graph.

gainrl.generate calls decode() on a GPU if this file is present. A model that is not supported is
decoded by gainrl.decode. Both write the same greedy completions, and the same sampled ones from
generators in the same state. This one may draw up to CHECK_EVERY - 1 tokens more, so later calls
with its generator give other samples.

A decode step launches about a thousand small kernels, and launching them takes the host longer than
the GPU needs to run them: 17 ms per token for 256 rows of Qwen2.5-0.5B on an H200, and 5.9 ms with
the graph. A CUDA graph is a recording of one step that is launched as a whole. It repeats the same
kernels on the same memory, so no tensor may change its shape or its place. The values that change
from step to step are in tensors, and the host looks at them only every CHECK_EVERY steps."""

import inspect
import weakref

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

import gainrl
from gainrl import next_token, run_backbone

CHECK_EVERY = 16  # steps between two checks whether all completions are finished
_agrees = weakref.WeakKeyDictionary()  # the result of static_cache_agrees for each model


def supports(model, cache):
    """Whether the static cache suits the model. It must accept position_ids instead of counting
    positions itself, its forward pass must never wait for the GPU, its cache must keep all tokens,
    and it must give the same states with a static cache, which is tried once per model."""
    takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    never_waits = model._can_compile_fullgraph  # according to transformers
    # Sliding windows and layers without attention have other types.
    keeps_all = all(type(layer) is DynamicLayer for layer in cache.layers)
    if not (takes_positions and never_waits and keeps_all):
        return False
    if model not in _agrees:
        _agrees[model] = static_cache_agrees(model)
    return _agrees[model]


@torch.no_grad()
def static_cache_agrees(model):
    """Whether the last of eight tokens has the same state with a static and with a growing cache,
    behind two tokens of padding. In float32, even on a GPU."""
    ids = torch.arange(10, device=model.device)[None]
    mask = ids >= 2
    with torch.autocast(model.device.type, enabled=False):
        expected, _ = run_backbone(model, ids, mask)
        _, cache = run_backbone(model, ids[:, :-1], mask[:, :-1])
        _, bias = make_static(cache, mask[:, :-1], max_cache_len=16)
        bias[..., 9] = 0.0
        position_ids = ids[:, -1:] - 2
        found, _ = run_backbone(model, ids[:, -1:], bias, cache, position_ids)
    error = (found[:, -1] - expected[:, -1]).abs().max()
    return bool(error <= 1e-3 * expected[:, -1].abs().max())


class StaticCacheLayer(DynamicLayer):
    """A cache layer with a fixed length. The keys and values of the next token are written in place
    at `cache_position`, a tensor (1,) that all layers share."""

    def __init__(self, layer, max_cache_len, cache_position):
        super().__init__()
        padding = (0, 0, 0, max_cache_len - layer.keys.shape[2])
        # Under autocast the rotary embedding makes float32 keys, and every product would round them
        # again to the dtype of the values. Here they are rounded once.
        self.keys = F.pad(layer.keys.to(layer.values.dtype), padding)
        self.values = F.pad(layer.values, padding)
        self.cache_position = cache_position
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.cache_position, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.cache_position, values.to(self.values.dtype))
        return self.keys, self.values


def make_static(cache, attention_mask, max_cache_len):
    """Give the layers of a cache the fixed length max_cache_len. attention_mask: (B, T), of the
    tokens in it.

    Returns two tensors that change in place before each token. cache_position (1,): where its keys
    and values go. bias (B, 1, 1, max_cache_len): what attention adds to the scores, 0 for visible
    tokens and the smallest number for padding and empty positions."""
    n_cached = attention_mask.shape[1]
    cache_position = torch.tensor([n_cached], device=attention_mask.device)
    cache.layers = [
        StaticCacheLayer(layer, max_cache_len, cache_position) for layer in cache.layers
    ]
    dtype = cache.layers[0].values.dtype
    smallest = torch.finfo(dtype).min
    bias = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    bias = bias.masked_fill(~attention_mask, smallest)
    bias = F.pad(bias, (0, max_cache_len - n_cached), value=smallest)
    return cache_position, bias[:, None, None]  # transformers passes a 4-D mask on unchanged


def decode(model, cache, hidden, ids, attention_mask, end_ids, config, generator):
    """The same as gainrl.decode, in steps that a GPU can replay as one graph. Finished rows stay in
    the batch; attention_mask hides what they write."""
    if not supports(model, cache):
        inputs = (model, cache, hidden, ids, attention_mask, end_ids, config, generator)
        return gainrl.decode(*inputs)
    lm_head = model.get_output_embeddings()
    n_rows, length = ids.shape
    prompt_length = length - config.max_new_tokens
    max_cache_len = length + -length % 16  # attention kernels want a multiple of 16
    cache_position, bias = make_static(cache, attention_mask[:, :prompt_length], max_cache_len)
    position_ids = attention_mask.sum(1, keepdim=True) - 1
    token = torch.empty_like(position_ids)
    active = torch.ones_like(token, dtype=torch.bool)

    def write_token(hidden):
        logits = lm_head(hidden)
        token.copy_(next_token(logits, config.temperature, generator, slice(None), n_rows))
        ids.index_copy_(1, cache_position, token)
        attention_mask.index_copy_(1, cache_position, active)
        active.logical_and_((token != end_ids).all(1, keepdim=True))

    def step():
        bias.index_fill_(3, cache_position, 0.0)
        position_ids.add_(1)
        hidden, _ = run_backbone(model, token, bias, cache, position_ids)
        cache_position.add_(1)
        write_token(hidden[:, -1])

    write_token(hidden)
    for n_tokens in range(1, config.max_new_tokens):
        if n_tokens % CHECK_EVERY == 0 and not active.any():
            break
        if n_tokens == 2 and ids.is_cuda:  # step 1 was a warm-up; CPUs, in tests, have no graphs
            step = capture(step, generator, ids.device)
        step()


def capture(step, generator, device):
    """Record step() as a CUDA graph; returns a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.device(device), torch.cuda.graph(graph):  # capture where the tensors are
        step()  # recorded, not run
    return graph.replay
