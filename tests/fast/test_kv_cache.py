"""The preallocated cache is a `DynamicCache`: fed with the same updates, both hold the same bits after every operation."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen3Config, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from llava15_fast.fast import limits
from llava15_fast.fast.kv_cache import KVPool, PooledLayer

LAYERS, HEADS, HEAD_DIM = 2, 2, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(limits, "KV_BLOCK", 8)
    monkeypatch.setattr(limits, "KV_HEADROOM", 2)


def states(batch, tokens):
    return torch.randn(batch, HEADS, tokens, HEAD_DIM)


def adopted(cache=None):
    cache = DynamicCache() if cache is None else cache
    write_in_place(cache, [states(1, 0)] * LAYERS, [states(1, 0)] * LAYERS)
    return cache


def update(caches, batch, tokens):
    """The same random keys and values for all caches, which return the same."""
    for layer in range(LAYERS):
        keys, values = states(batch, tokens), states(batch, tokens)
        first, *others = (cache.update(keys, values, layer) for cache in caches)
        for other in others:
            assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


def write_in_place(cache, keys, values, pool=None):
    """As the kernels fill a cache; keys and values per layer."""
    pool = pool or KVPool()
    assert pool.guard(cache, LAYERS) is None
    past, tokens = cache.get_seq_length(), keys[0].shape[2]
    like = keys[0].new_empty(len(keys[0]), 0, HEADS, HEAD_DIM)
    loan = pool.borrow(cache, LAYERS, like, past + tokens)
    for pair, new in zip(loan.buffers.layers, zip(keys, values, strict=True), strict=True):
        for storage, given in zip(pair, new, strict=True):
            storage[:, past : past + tokens] = given.transpose(1, 2)
    loan.advance(tokens)
    return loan


def write(caches, batch, tokens):
    """The same random keys and values: into the buffers of the first cache, into the others by `update`."""
    keys, values = ([states(batch, tokens) for _ in range(LAYERS)] for _ in range(2))
    write_in_place(caches[0], keys, values)
    for cache in caches[1:]:
        for layer in range(LAYERS):
            cache.update(keys[layer], values[layer], layer)


def assert_equal(ours, stock):
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3, 0) == stock.get_mask_sizes(3, 0)
    assert not ours.is_compileable and ours.is_croppable and not any(ours.is_sliding)
    if stock.get_seq_length():
        for (keys, values, *rest), (their_keys, their_values, *their_rest) in zip(ours, stock, strict=True):
            assert torch.equal(keys, their_keys) and torch.equal(values, their_values) and rest == their_rest


operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["update", "write", "crop", "repeat"]), st.integers(1, 20)),
        st.tuples(st.sampled_from(["reorder", "select"]), st.lists(st.integers(0, 99), min_size=1, max_size=4)),
        st.tuples(st.sampled_from(["reset", "deepcopy", "pickle", "adopt"]), st.none()),
    ),
    min_size=1,
    max_size=12,
)


@given(operations, st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_operations(operations, batch, seed):
    torch.manual_seed(seed)
    first_batch = batch
    ours, stock = adopted(), DynamicCache()
    for name, number in operations:
        length = stock.get_seq_length()
        if name == "update":
            update([ours, stock], batch, number)
        elif name == "write":
            write([ours, stock], batch, number)
        elif name == "reset":
            ours.reset()
            stock, batch = DynamicCache(), first_batch  # what a reset means: transformers 5.17 zeroes instead
        elif name in ("deepcopy", "pickle"):
            before = ours
            ours = copy.deepcopy(ours) if name == "deepcopy" else pickle.loads(pickle.dumps(ours))
            update([before], batch, 3)  # goes its own way from now on
        elif name == "adopt":
            write([ours, stock], batch, 0) if length else None
        elif not length:
            continue
        elif name == "crop":
            for cache in (ours, stock):
                cache.crop(-min(number, length - 1))
        elif name == "repeat":
            if batch * (repeats := 1 + number % 2) <= 6:
                batch *= repeats
                for cache in (ours, stock):
                    cache.batch_repeat_interleave(repeats)
        elif name == "reorder":
            chosen = torch.tensor([number[row % len(number)] % batch for row in range(batch)])
            for cache in (ours, stock):
                cache.reorder_cache(chosen)
        elif name == "select":
            chosen = torch.tensor([row % batch for row in number])
            batch = len(chosen)
            for cache in (ours, stock):
                cache.batch_select_indices(chosen)
        assert_equal(ours, stock)


def addresses(cache):
    return [side.data_ptr() for layer in cache.layers for side in layer.peek()]


def test_tokens_do_not_move_the_buffers_until_they_are_full():
    cache, stock = DynamicCache(), DynamicCache()
    write([cache, stock], 2, 3)
    moves, before = [], addresses(cache)
    for length in range(4, 41):
        write([cache, stock], 2, 1)
        if (now := addresses(cache)) != before:
            moves.append(length)
        before = now
        assert_equal(copy.deepcopy(cache), stock)  # who reads keys keeps them as they are
    assert moves == [9, 17, 25, 33]  # each block holds 8, and growing leaves room for 2 more at least


def test_a_prompt_gets_its_room_at_once():
    def shape(cache):
        return tuple(cache.layers[0]._loan.buffers.layers[0][0].shape)

    cache = DynamicCache()
    write([cache], 1, 6)
    assert shape(cache) == (1, 8, HEADS, HEAD_DIM)
    cache = DynamicCache()
    write([cache], 1, 7)
    assert shape(cache) == (1, 16, HEADS, HEAD_DIM)  # 8 would be full in a moment
    write([cache], 1, 23)  # and so does a long second turn
    assert shape(cache) == (1, 32, HEADS, HEAD_DIM)


def test_cropping_keeps_the_buffers_and_what_follows_overwrites():
    cache, stock = DynamicCache(), DynamicCache()
    write([cache, stock], 2, 4)
    before = addresses(cache)
    for tokens in (3, 1, 0):
        for one in (cache, stock):
            one.crop(-tokens)
        write([cache, stock], 2, tokens + 1)
        assert_equal(copy.deepcopy(cache), stock)  # who reads keys keeps them as they are
    assert addresses(cache) == before


def test_cropping_everything():
    cache, stock = adopted(), DynamicCache()
    update([cache, stock], 2, 5)
    for one in (cache, stock):
        one.crop(-5)
    assert cache.get_seq_length() == stock.get_seq_length() == 0
    update([cache, stock], 2, 2)
    assert_equal(cache, stock)


@pytest.mark.parametrize("length", [2, 5, 6, 9])
def test_cropping_to_a_length(length):
    """With a positive number: some versions of transformers take it, the others say what is wrong with it."""

    def crop(cache):
        try:
            return cache.crop(length)
        except ValueError as error:
            return str(error)

    cache, stock = adopted(), DynamicCache()
    update([cache, stock], 1, 6)
    assert crop(cache) == crop(stock)
    assert_equal(cache, stock)


def test_beams_stay_in_their_buffers():
    cache, stock = DynamicCache(), DynamicCache()
    write([cache, stock], 3, 4)
    before = addresses(cache)
    for order in ([2, 2, 0], [1, 0, 2], [0, 0, 0]):
        for one in (cache, stock):
            one.reorder_cache(torch.tensor(order))
        write([cache, stock], 3, 1)
        assert_equal(copy.deepcopy(cache), stock)  # who reads keys keeps them as they are
    assert addresses(cache) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.reset(),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    ],
    ids=["crop", "reorder", "reset", "select"],
)
def test_what_was_read_before_does_not_change(change):
    """Keys and values that someone keeps are theirs, as with transformers' own cache."""
    cache = adopted()
    update([cache], 2, 5)
    kept = [pair[:2] for pair in cache]
    expected = copy.deepcopy(kept)
    change(cache)
    update([cache], 2, 4)
    for pair, wanted in zip(kept, expected, strict=True):
        assert torch.equal(pair[0], wanted[0]) and torch.equal(pair[1], wanted[1])


def test_reset_and_again_with_other_prompts():
    cache = adopted()
    update([cache], 2, 5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (3, 0) and not cache.is_initialized
    stock = DynamicCache()
    update([cache, stock], 3, 4)
    assert_equal(cache, stock)


def test_early_initialization():
    cache, stock = adopted(), DynamicCache(config=config())
    for one in (cache, stock):
        one.early_initialization(2, HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
        assert one.get_seq_length() == 0 and one.is_initialized
    update([cache, stock], 2, 3)
    assert_equal(cache, stock)


def test_room_for_another_batch_is_refused():
    cache = DynamicCache()
    write([cache], 2, 5)
    with pytest.raises(ValueError, match="holds 2 prompts, but the input has 3"):
        write([cache], 3, 1)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    cache = adopted()
    keys, values = states(1, 9).to(dtype), states(1, 9).to(dtype)
    found = cache.update(keys, values, 0)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values) and found[0].dtype == dtype


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("captured", [False, True], ids=["no graph", "graph"])
def test_buffers_of_a_cache_that_is_gone(read, captured):
    """They are kept for their graph, and lent to the next cache, but not while someone may still look at them."""
    pool, cache = KVPool(), DynamicCache()
    loan = write_in_place(cache, [states(2, 5)] * LAYERS, [states(2, 5)] * LAYERS, pool)
    loan.buffers.slot.graph = object() if captured else None
    before = addresses(cache)
    kept = [pair[:2] for pair in cache] if read else []
    expected = copy.deepcopy(kept)
    del cache, loan
    gc.collect()
    assert len(pool.idle) == (captured and not read)
    following = DynamicCache()
    loan = pool.borrow(following, LAYERS, torch.empty(2, 0, HEADS, HEAD_DIM), 3)
    assert not captured or ([side.data_ptr() for pair in loan.buffers.layers for side in pair] == before) is not read
    assert not any(side.any() for pair in loan.buffers.layers for side in pair)
    for pair, wanted in zip(kept, expected, strict=True):
        assert torch.equal(pair[0], wanted[0]) and torch.equal(pair[1], wanted[1])


# Which caches are adopted


def config(**changes):
    sizes = {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "hidden_size": 16}
    return Qwen3Config(**sizes, **changes)


@pytest.mark.parametrize("filled", [0, 5, 30])
@pytest.mark.parametrize("make", [DynamicCache, lambda: DynamicCache(config=config())], ids=["lazy", "config"])
def test_borrowing_keeps_the_contents(make, filled):
    """And the objects: who has kept a layer of the cache sees what it holds."""
    cache = make()
    if filled:
        update([cache], 2, filled)
    stock, layers = copy.deepcopy(cache), list(cache.layers)
    write([cache, stock], 2, 7)
    assert type(cache) is DynamicCache and [type(layer) for layer in cache.layers] == [PooledLayer] * LAYERS
    assert all(now is then for now, then in zip(cache.layers, layers, strict=False))
    assert_equal(cache, stock)


def test_borrowing_does_not_share_memory_with_the_user():
    keys, values = states(1, 4), states(1, 4)
    cache = DynamicCache([(keys, values)] * LAYERS)
    before = keys.clone()
    loan = write_in_place(cache, [states(1, 1)] * LAYERS, [states(1, 1)] * LAYERS)
    for pair in loan.buffers.layers:
        for side in pair:
            side.zero_()
    assert torch.equal(keys, before)


def test_borrowing_twice_changes_nothing():
    cache, pool = DynamicCache(), KVPool()
    loan = write_in_place(cache, [states(1, 3)] * LAYERS, [states(1, 3)] * LAYERS, pool)
    before = addresses(cache)
    assert pool.borrow(cache, LAYERS, torch.empty(1, 0, HEADS, HEAD_DIM), 3) is loan
    assert addresses(cache) == before and loan.is_whole


class OwnCache(DynamicCache):
    pass


class OwnLayer(DynamicLayer):
    pass


REFUSED = {
    "static": lambda: StaticCache(config=config(), max_cache_len=8),
    "sliding window": lambda: DynamicCache(config=config(use_sliding_window=True, sliding_window=4, max_window_layers=0)),
    "a method of its own": lambda: with_update(DynamicCache()),
    "one sliding layer": lambda: Cache(layers=[DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)]),
    "of its own class": OwnCache,
    "layers of their own class": lambda: with_layers([OwnLayer() for _ in range(LAYERS)]),
    "layers of their own class, made later": lambda: with_layers([], OwnLayer),
    "of a deeper model": lambda: with_layers([DynamicLayer() for _ in range(LAYERS + 1)]),
    "offloaded": lambda: offloaded(DynamicCache()),
    "not a dynamic cache": lambda: Cache(layer_class_to_replicate=DynamicLayer),
}


def with_layers(layers, later=None):
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, later
    return cache


def with_update(cache):
    cache.update = lambda keys, values, layer, *args: (keys, values)
    return cache


def offloaded(cache):
    cache.offloading = True  # its constructor makes a stream, which needs a GPU
    return cache


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_other_caches_are_refused_and_left_alone(make):
    cache = make()
    layers, attributes = list(cache.layers), dict(cache.__dict__)
    assert KVPool().guard(cache, LAYERS)
    assert list(cache.layers) == layers and {**cache.__dict__, "layers": attributes["layers"]} == attributes


def test_beams_in_inference_mode_leave_a_cache_that_can_be_written_to():
    """Someone has looked at it, so that they are put in order in new storages."""
    ours, stock = adopted(), DynamicCache()
    update((ours, stock), 2, 3)
    assert ours.layers[0].keys is not None
    with torch.inference_mode():
        for cache in (ours, stock):
            cache.reorder_cache(torch.tensor([1, 0]))
    update((ours, stock), 2, 2)
    assert_equal(ours, stock)


def test_another_number_of_prompts_is_refused_and_nothing_is_written():
    cache = DynamicCache()
    write([cache], 3, 4)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):  # torch's, as for transformers' own
        cache.update(states(1, 2), states(1, 2), 0)
    assert [layer.get_seq_length() for layer in cache.layers] == [4] * LAYERS


